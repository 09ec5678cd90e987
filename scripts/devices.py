"""GPUs by name: what their data sheets say, for rooflines, and what XLA asks before it compiles.

Rates are those of dense products, bandwidths the peak ones; `link` is what a device can send to the
others of its machine, one way. The limits are from the CUDA programming guide's table of technical
specifications by compute capability.
"""

import dataclasses

# Threads of a multiprocessor, float32 units, shared memory of a multiprocessor and of a block.
_LIMITS = {
    (9, 0): (2048, 128, 233_472, 232_448),
    (8, 9): (1536, 128, 102_400, 101_376),
    (8, 0): (2048, 64, 167_936, 166_912),
    (7, 5): (1024, 64, 65_536, 65_536),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of GPU; bytes, FLOP and seconds."""

    kind: str  # as jax calls it
    capability: tuple[int, int]
    memory: float
    bandwidth: float  # of its memory
    half: float  # FLOP/s of products in 16 bits
    single: float  # of products in float32, as tensorfloat32 where there is that
    link: float
    cores: int
    clock: float  # GHz
    cache: int
    source: str

    def rate(self, products: str) -> float:
        """FLOP a second of products of a kind, "16 bit" or "float32"."""
        return self.half if products == "16 bit" else self.single

    def target(self) -> str:
        """The device as XLA wants it told, to compile for it where there is none."""
        threads, units, shared, block = _LIMITS[self.capability]
        return _TARGET.format(
            **dataclasses.asdict(self), threads=threads, units=units, shared=shared, block=block
        )


_H200 = Device(
    kind="NVIDIA H200",
    capability=(9, 0),
    memory=141e9,
    bandwidth=4.8e12,
    half=989e12,
    single=494e12,
    link=450e9,
    cores=132,
    clock=1.98,
    cache=50 << 20,
    source="https://www.nvidia.com/en-us/data-center/h200/",
)
_A100 = Device(
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    memory=80e9,
    bandwidth=2.039e12,
    half=312e12,
    single=156e12,
    link=300e9,
    cores=108,
    clock=1.41,
    cache=40 << 20,
    source="https://www.nvidia.com/en-us/data-center/a100/",
)
DEVICES = {
    "h200": _H200,
    "h100": dataclasses.replace(
        _H200,
        kind="NVIDIA H100 80GB HBM3",
        memory=80e9,
        bandwidth=3.35e12,
        source="https://www.nvidia.com/en-us/data-center/h100/, SXM",
    ),
    "a100-80": _A100,
    "a100-40": dataclasses.replace(
        _A100, kind="NVIDIA A100-SXM4-40GB", memory=40e9, bandwidth=1.555e12
    ),
    "l4": Device(
        kind="NVIDIA L4",
        capability=(8, 9),
        memory=24e9,
        bandwidth=0.3e12,
        half=121e12,
        single=60e12,
        link=32e9,  # PCIe 4.0 x16
        cores=58,
        clock=2.04,
        cache=48 << 20,
        source="https://www.nvidia.com/en-us/data-center/l4/",
    ),
    "t4": Device(
        kind="Tesla T4",
        capability=(7, 5),
        memory=16e9,
        bandwidth=0.32e12,
        half=65e12,
        single=8.1e12,
        link=16e9,  # PCIe 3.0 x16
        cores=40,
        clock=1.59,
        cache=4 << 20,
        source="https://www.nvidia.com/en-us/data-center/tesla-t4/",
    ),
    "rtx4090": Device(
        kind="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        memory=24e9,
        bandwidth=1.008e12,
        half=165.2e12,
        single=82.6e12,
        link=32e9,  # PCIe 4.0 x16
        cores=128,
        clock=2.52,
        cache=72 << 20,
        source="NVIDIA Ada GPU Architecture, appendix A",
    ),
}
# What one was measured to reach: copies, products of large matrices.
H200_MEASURED = dataclasses.replace(_H200, bandwidth=4.0e12, half=790e12, single=350e12)
