"""Where CUDA is, told to JAX before it is imported."""

import importlib.util
import os
import pathlib
import shutil

_TOOLKIT = ("bin/nvcc", "bin/ptxas", "nvvm/libdevice/libdevice.10.bc")


def name_cuda_folder() -> None:
    """Set CUDA_ROOT to the toolkit whose nvcc is found, unless JAX finds nvidia's wheels.

    With its CUDA plug-in and a part of the wheels, JAX takes the string "None" for the folder. It
    reads CUDA_ROOT when it is imported, so this must come before.
    """
    if "CUDA_ROOT" in os.environ or _finds_wheels():
        return
    for nvcc in filter(None, (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")):
        folder = pathlib.Path(nvcc).resolve().parents[1]
        if all((folder / file).exists() for file in _TOOLKIT):  # it may be a script elsewhere
            os.environ["CUDA_ROOT"] = str(folder)
            return


def _finds_wheels() -> bool:
    """JAX looks into the first of these packages that is there, and into no other."""
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # there is no package `nvidia`
            return False
        if spec:
            folders = spec.submodule_search_locations or ()
            return any(pathlib.Path(folder, "bin", "ptxas").exists() for folder in folders)
    return False
