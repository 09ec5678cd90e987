"""Logs as trainers write them are read without a word on what their columns are."""

import gzip
import json
import math
import random
from math import nan

import pytest
from tensorboardX import SummaryWriter

from lm_jax.doctor.log import examine_log
from lm_jax.doctor.log.read import number, read_log
from lm_jax.preflight.command import main

BAR = [(10, 9.5), (20, 8.5)]
WANTED = BAR, [(20, 8.75)], [(10, 1e-4), (20, 2e-4)]


def write(folder, text, name="log.txt", encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding, newline="")
    return path


def column(log, name, at="step"):
    """(step, value) of a metric in the order of the file; None where a row has no step."""
    rows = [row for row in log.records if name in row]
    return [(number(row[at]) if at in row else None, number(row[name])) for row in rows]


NANOGPT = """\
tokens per iteration will be: 491,520
Overriding: learning_rate = 0.0006
number of parameters: 123.59M
step 0: train loss 10.9871, val loss 10.9901
iter 0: loss 10.9886, time 51203.11ms, mfu -100.00%
iter 10: loss 9.8012, time 250.11ms, mfu 36.10%
iter 20: loss 8.9010, time 250.09ms, mfu 36.12%
step 20: train loss 8.8790, val loss 8.9020
saving checkpoint to out-2026
iter 30: loss nan, time 250.09ms, mfu 36.12%
"""

BUILD_NANOGPT = """\
using device: cuda
total desired batch size: 524288
validation loss: 10.9511
HellaSwag accuracy: 2463/10042=0.2453
step     0 | loss: 10.955029 | lr 8.3916e-07 | norm: 15.3421 | dt: 23547.05ms | tok/sec: 22265.00
step   120 | loss: 6.847876 | lr 1.0154e-04 | norm: 1.2142 | dt: 416.30ms | tok/sec: 1259389.92
validation loss: 6.7012
step   240 | loss: 6.223423 | lr 2.0224e-04 | norm: 0.8897 | dt: 415.54ms | tok/sec: 1261681.91
"""

BUILD_NANOGPT_FILE = """\
0 val 10.9511
0 hella 0.2453
0 train 10.955029
120 train 6.847876
250 val 6.1004
250 hella 0.2481
250 train 6.150010
"""

LLM_C = """\
+-----------------------+----------------------------------------------------+
| max_sequence_length T | 1024                                               |
| learning rate (LR)    | 6.000000e-04                                       |
val loss 11.009140
step    1/74 | loss 11.009054 (+nanz)| norm 15.3400 (+nanz)| lr 3.00e-06 | 2260.34 ms | 40.1% \
bf16 MFU | 232k tok/s
step   21/74 | loss 9.561233 (+0.10z)| norm 3.1022 (-0.31z)| lr 6.30e-05 | 1260.34 ms | 41.6% \
bf16 MFU | 415k tok/s
val loss 9.512345
step   22/74 | loss 9.512001 (-0.20z)| norm 3.0101 (-0.35z)| lr 6.60e-05 | 1261.00 ms | 41.6% \
bf16 MFU | 1.2M tok/s
"""

LLM_C_MAIN = """\
s:0 tel:11.0091
s:0 eval:0.2461
s:1 trl:10.9598 lr:0.000001 norm:15.34
s:2 trl:10.8556 lr:0.000002 norm:14.84
s:250 tel:6.4512
s:250 trl:6.5000 lr:0.000180 norm:1.10
"""

MODDED = """\
import os
====================================================================================================
Running python 3.10.12
step:0/1750 val_loss:10.8258 train_time:0ms step_avg:nanms
step:10/1750 train_loss:7.1003 train_time:1290ms step_avg:141.2ms
step:125/1750 train_loss:4.6012 train_time:16790ms step_avg:141.2ms
step:125/1750 val_loss:4.45776 train_time:16790ms step_avg:141.20ms
"""

MEGATRON = """\
 [2026-01-03 11:02:41] iteration      100/  500000 | consumed samples:        25600 | elapsed time \
per iteration (ms): 1521.3 | throughput per GPU (TFLOP/s/GPU): 180.2 | learning rate: 1.500000E-06 \
| global batch size:   256 | lm loss: 9.100123E+00 | loss scale: 1.0 | grad norm: 5.201 | number \
of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-01-03 11:04:41] iteration      200/  500000 | consumed samples:        51200 | elapsed time \
per iteration (ms): 1520.9 | learning rate: 3.000000E-06 | global batch size:   256 | lm loss: \
8.220456E+00 | loss scale: 1.0 | grad norm: 3.113 | number of skipped iterations:   0 |
-----------------------------------------------------------------------------------------------
 validation loss at iteration 200 | lm loss value: 8.150000E+00 | lm loss PPL: 3.463374E+03 |
"""

HF_STDOUT = """\
  0%|          | 0/300 [00:00<?, ?it/s]\r  3%|3         | 10/300 [00:05<02:31,  1.92it/s]
{'loss': 2.3011, 'grad_norm': 1.1012, 'learning_rate': 5e-05, 'epoch': 0.5}
{'loss': 2.1503, 'grad_norm': nan, 'learning_rate': 2.5e-05, 'epoch': 1.0}
100%|##########| 20/20 [00:02<00:00,  9.10it/s]
{'eval_loss': 2.2004, 'eval_runtime': 2.3, 'eval_samples_per_second': 8.7, 'epoch': 1.0}
{'train_runtime': 301.2, 'train_samples_per_second': 9.9, 'train_loss': 2.2257, 'epoch': 1.0}
"""

WORD_LM = """\
| epoch   1 |   200/ 1000 batches | lr 20.00 | ms/batch 12.12 | loss  7.64 | ppl  2079.22
| epoch   1 |   400/ 1000 batches | lr 20.00 | ms/batch 12.06 | loss  6.87 | ppl   962.95
-----------------------------------------------------------------------------------------
| end of epoch   1 | time: 42.6s | valid loss  5.61 | valid ppl   273.14
-----------------------------------------------------------------------------------------
| epoch   2 |   200/ 1000 batches | lr 20.00 | ms/batch 12.07 | loss  5.90 | ppl   365.04
| end of epoch   2 | time: 42.5s | valid loss  5.20 | valid ppl   181.27
=========================================================================================
| End of training | test loss  5.11 | test ppl   165.67
"""

FAIRSEQ = """\
2026-03-02 10:11:12 | INFO | fairseq_cli.train | Namespace(clip_norm=0.1, lr=[0.0005], update=4)
2026-03-02 10:12:12 | INFO | train_inner | epoch 001:    200 / 400 loss=10.881, ppl=1886.05, \
wps=41012, ups=1.1, wpb=36000.1, bsz=72, num_updates=200, lr=2.5e-05, gnorm=2.101, clip=100, wall=99
2026-03-02 10:13:12 | INFO | train_inner | epoch 001:    400 / 400 loss=9.410, ppl=680.29, \
wps=41012, ups=1.1, wpb=36000.1, bsz=72, num_updates=400, lr=5e-05, gnorm=1.501, clip=100, wall=199
2026-03-02 10:13:13 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 9.103 | ppl 549.9 \
| wps 93001 | wpb 2001.0 | bsz 4 | num_updates 400
2026-03-02 10:13:14 | INFO | train | epoch 001 | loss 10.120 | ppl 1112.8 | wps 41012 | ups 1.1 | \
wpb 36000.1 | bsz 72 | num_updates 400 | lr 5e-05 | gnorm 1.801 | clip 100 | wall 200
2026-03-02 10:14:12 | INFO | train_inner | epoch 002:    200 / 400 loss=8.801, ppl=446.03, \
wps=41012, ups=1.1, wpb=36000.1, bsz=72, num_updates=600, lr=7.5e-05, gnorm=1.201, clip=100, wall=9
"""

FAIRSEQ_OLD = """\
| epoch 001 | loss 9.100 | ppl 548.70 | wps 41012 | num_updates 445 | lr 0.0001 | gnorm 1.8
| epoch 001 | valid on 'valid' subset | loss 8.200 | ppl 294.07 | num_updates 445
| epoch 002 | loss 7.900 | ppl 238.86 | wps 41012 | num_updates 890 | lr 0.0002 | gnorm 1.1
"""

FAIRSEQ_JSON = """\
2026-03-02 10:12:12 | INFO | train_inner | {"epoch": 1, "update": 0.5, "loss": "10.881", \
"ppl": "1886.05", "wps": "41012", "num_updates": "200", "lr": "2.5e-05", "gnorm": "2.101"}
2026-03-02 10:13:13 | INFO | valid | {"epoch": 1, "valid_loss": "9.103", "valid_ppl": "549.9", \
"valid_num_updates": "400"}
"""

EVALUATING = """\
Training:  10%|#    | 10/100 [00:10<01:30, 10.00it/s, loss=9.5]
Evaluating:  50%|##   | 5/10 [00:01<00:01,  5.00it/s, loss=9.75]
Training:  20%|##   | 20/100 [00:20<01:20, 10.00it/s, loss=8.5]
"""

LIGHTNING_BAR = (
    "\r".join(
        f"Epoch {e}:  {i}%|##   | {i}/100 [00:10<01:30, 10.00it/s, v_num=0, loss={9 - e - i / 100}]"
        for e in (0, 1)
        for i in (20, 20, 60)
    )
    + "\n"
)

PREFIXED = (
    "\x1b[32m[rank0]:2026-05-05 12:00:00,123 INFO:root:\x1b[0mstep 10, loss 9.5, lr: 1e-4\n"
    "[1,0]<stdout>:INFO 05-05 12:00:01 train.py:120] step=1,020 loss=8.25 lr=2e-4\n"
    "[2026-05-05 12:00:02][INFO] Step: 1,030 - loss: 8.125 - lr: 3e-4\n"
)

NANOCHAT = """\
step 00100/21400 (0.47%) | loss: 5.123000 | lrm: 1.00 | dt: 350.10ms | tok/sec: 1,497,000 | \
mfu: 47.12 | total time: 0.61m
Step 00250 | Validation bpb: 1.2345
step 00300/21400 (1.40%) | loss: 4.500000 | lrm: 1.00 | dt: 350.10ms | tok/sec: 1,498,000 | \
mfu: 47.12 | total time: 1.91m
"""

TORCHTITAN = """\
[rank0]:2026-01-01 10:00:00,123 - root - INFO - \x1b[31mstep: 10  \x1b[32mloss:  8.1234  \
\x1b[33mmemory: 10.1GiB(12.75%)  \x1b[34mtps: 12,345  \x1b[36mtflops: 123.40  mfu: 34.50%\x1b[0m
[rank0]:2026-01-01 10:00:09,123 - root - INFO - step: 20  loss:  7.2500  memory: 10.10GiB(12.75%)  \
tps: 12,400  tflops: 123.90  mfu: 34.60%
"""

LLAMA2_C = """\
step 0: train loss 10.4012, val loss 10.4098
0 | loss 10.4011 | lr 0.000000e+00 | 5210.01ms | mfu -100.00%
10 | loss 9.8012 | lr 5.000000e-06 | 120.31ms | mfu 3.10%
20 | loss 9.1012 | lr 1.000000e-05 | 120.31ms | mfu 3.10%
"""

LITGPT = """\
Epoch 1 | iter 32 step 1 | loss train: 3.125, val: n/a | iter time: 123.41 ms (step)
Epoch 1 | iter 64 step 2 | loss train: 3.000, val: n/a | iter time: 123.41 ms (step)
iter 64: val loss 2.9012, val time: 9000.00 ms
"""

TUTORIAL = """\
Epoch [1/3], Step [100/300], Loss: 2.3012
Epoch [1/3], Step [200/300], Loss: 2.2012
Epoch [1/3], Step [300/300], Loss: 2.1012
Epoch [2/3], Step [100/300], Loss: 2.0012
"""

EPOCHS = """\
Epoch: 1/3 | Train Loss: 3.25 | Val Loss: 3.50 | Time: 12s
Epoch: 2/3 | Train Loss: 3.00 | Val Loss: 3.25 | Time: 12s
"""

BLOCKS = """\
2026-01-01 10:00:00.123 worker:0 olmo.train:967 INFO [step=10/1000,epoch=0]
    optim/total_grad_norm=1.5000
    train/CrossEntropyLoss=10.25
    optim/learning_rate_group0=0.0001
2026-01-01 10:00:09.123 worker:0 olmo.train:967 INFO [step=20/1000,epoch=0]
    train/CrossEntropyLoss=9.25
"""

DEEPSPEED = """\
[2026-01-01 10:00:00,123] [INFO] [logging.py:69:log_dist] [Rank 0] step=10, skipped=0, \
lr=[0.0001], mom=[[0.9, 0.95]]
steps: 10 loss: 9.1250 iter time (s): 1.210 samples/sec: 12.345
[2026-01-01 10:00:09,123] [INFO] [logging.py:69:log_dist] [Rank 0] step=20, skipped=0, \
lr=[0.0002], mom=[[0.9, 0.95]]
steps: 20 loss: 8.2500 iter time (s): 1.210 samples/sec: 12.345
 validation results at iteration 20 | lm_loss value: 8.300000E+00 | lm_loss_ppl value: 4.02E+03 |
"""

MAXTEXT = """\
completed step: 10, seconds: 36.1, TFLOP/s/device: 2.1, total_weights: 65536, loss: 10.875
eval metrics after step: 10, loss=10.750, total_weights=1000.0
completed step: 11, seconds: 6.1, TFLOP/s/device: 2.1, total_weights: 65536, loss: 10.625
"""

NEMO = """\
Training epoch 0, iteration 0/99 | lr: 1.5e-05 | global_batch_size: 8 | global_step: 0 | \
reduced_train_loss: 11.03 | train_step_timing in s: 12.3
Training epoch 0, iteration 1/99 | lr: 3e-05 | global_batch_size: 8 | global_step: 1 | \
reduced_train_loss: 10.91 | train_step_timing in s: 1.3 | val_loss: 10.8
"""

LOGURU = """\
2026-01-01 10:00:00.123 | INFO     | __main__:train:123 - step=10 loss=9.5 lr=1e-4
2026-01-01 10:00:01.123 | INFO     | __main__:train:123 - step=20 loss=8.5 lr=2e-4
2026-01-01 10:00:02.123 | INFO     | my.loop:evaluate:45 - step=20 val loss=8.75
"""

CLU = """\
I0101 10:00:00.123456 140012 logging_writer.py:48] [10] learning_rate=0.0001, loss=9.5
I0101 10:00:01.123456 140012 logging_writer.py:48] [20] learning_rate=0.0002, loss=8.5
I0101 10:00:02.123456 140012 logging_writer.py:48] [20] eval_loss=8.75
"""

TITAN_VALIDATES = """\
[titan] 2026-01-01 10:00:00,123 - root - INFO - step: 10  loss:  9.5000  grad_norm:  1.2
[titan] 2026-01-01 10:00:01,123 - root - INFO - step: 20  loss:  8.5000  grad_norm:  1.1
[titan] 2026-01-01 10:00:02,123 - root - INFO - validate step: 20  loss:  8.7500  tps: 22,345
"""

FAIRSEQ2 = """\
[Rank 0] INFO fairseq2 - Train Metrics (step 10) - Negative Log-Likelihood (NLL) Loss: 9.5 | \
Gradient Norm: 1.2 | Learning Rate: 1e-04 | Elapsed Time: 10s
[Rank 0] INFO fairseq2 - Train Metrics (step 20) - Negative Log-Likelihood (NLL) Loss: 8.5 | \
Gradient Norm: 1.2 | Learning Rate: 2e-04 | Elapsed Time: 10s
[Rank 0] INFO fairseq2 - Validation Metrics (step 20) - Negative Log-Likelihood (NLL) Loss: 8.75
"""

COMPOSER = """\
[batch=10/600]:
\t Train metrics/train/LanguageCrossEntropy: 9.5000
\t Train lr-DecoupledAdamW/group0: 0.0001
[batch=20/600]:
\t Train metrics/train/LanguageCrossEntropy: 8.5000
\t Train lr-DecoupledAdamW/group0: 0.0002
\t Eval metrics/eval/LanguageCrossEntropy: 8.7500
"""

SECTIONS = """\
epoch=0 step=10 | train: loss=9.5 acc=0.1
epoch=0 step=20 | train: loss=8.5 acc=0.1 | val: loss=8.75 acc=0.1
step=30 | loss=8.0 acc=10% | val_acc=12%
"""

TENSORS = """\
step 10, loss: tensor(9.5, device='cuda:0', grad_fn=<NllLossBackward0>), lr [np.float64(0.0001)]
step 20, loss: Array(8.5, dtype=float32), lr [np.float64(0.0002)]
step 20, val_loss: np.float32(8.75)
"""

BARS = (
    "\r".join(f"train:  {i}%|#  | {i}/100 [00:10<00:10,  1.2it/s, loss={x}]" for i, x in BAR)
    + "\nvalidating:  50%|#  | 1/2 [00:10<00:10,  1.2it/s, loss=8.75]\n"
)

ACCELERATE = "\n".join(
    f"Steps:   {i}%|#  | {i}/100 [00:10<00:10,  1.2it/s, lr={i}e-5, step_loss={x}]" for i, x in BAR
)

KERAS = """\
Epoch 1/2
\x1b[1m100/100\x1b[0m \x1b[32m━━━━\x1b[0m 8ms/step - loss: 9.5 - val_loss: 9.0
Epoch 2/2
 50/100 [===>...] - ETA: 4s - loss: 8.6\b\b\b\b\b\b100/100 [====] - loss: 8.5 - val_loss: 8.75
"""

NO_STEPS = "Loading data 3 of 4\n" + "".join(f"loss: {x}\n" for x in (9.5, 9.25, 9.0, 8.5))

CONSOLE = {
    "loguru": (LOGURU, *WANTED),
    "clu": (CLU, *WANTED),
    "torchtitan_validates": (TITAN_VALIDATES, *WANTED[:2], []),
    "fairseq2": (FAIRSEQ2, *WANTED),
    "composer": (COMPOSER, *WANTED),
    "sections": (SECTIONS, [*BAR, (30, 8.0)], WANTED[1], []),
    "tensors": (TENSORS, *WANTED),
    "bars": (BARS, *WANTED[:2], []),
    "accelerate": (ACCELERATE, WANTED[0], [], WANTED[2]),
    "keras": (KERAS, [(100, 9.5), (150, 8.6), (200, 8.5)], [(100, 9.0), (200, 8.75)], []),
    "no_steps": (NO_STEPS, [(None, 9.5), (None, 9.25), (None, 9.0), (None, 8.5)], [], []),
    "maxtext": (MAXTEXT, [(10, 10.875), (11, 10.625)], [(10, 10.75)], []),
    "nemo": (NEMO, [(0, 11.03), (1, 10.91)], [(1, 10.8)], [(0, 1.5e-5), (1, 3e-5)]),
    "evaluating": (EVALUATING, [(10, 9.5), (20, 8.5)], [(10, 9.75)], []),
    "nanochat": (NANOCHAT, [(100, 5.123), (300, 4.5)], [], []),
    "torchtitan": (TORCHTITAN, [(10, 8.1234), (20, 7.25)], [], []),
    "llama2_c": (
        LLAMA2_C,
        [(0, 10.4011), (10, 9.8012), (20, 9.1012)],
        [(0, 10.4098)],
        [(0, 0), (10, 5e-6), (20, 1e-5)],
    ),
    "litgpt": (LITGPT, [(1, 3.125), (2, 3.0)], [(64, 2.9012)], []),
    "tutorial": (TUTORIAL, [(100, 2.3012), (200, 2.2012), (300, 2.1012), (400, 2.0012)], [], []),
    "epochs": (EPOCHS, [(None, 3.25), (None, 3.0)], [(None, 3.5), (None, 3.25)], []),
    "blocks": (BLOCKS, [(10, 10.25), (20, 9.25)], [], []),
    "deepspeed": (
        DEEPSPEED,
        [(10, 9.125), (20, 8.25)],
        [(20, 8.3)],
        [(10, 1e-4), (20, 2e-4)],
    ),
    "nanogpt": (
        NANOGPT,
        [(0, 10.9886), (10, 9.8012), (20, 8.9010), (30, math.nan)],
        [(0, 10.9901), (20, 8.9020)],
        [],
    ),
    "build_nanogpt": (
        BUILD_NANOGPT,
        [(0, 10.955029), (120, 6.847876), (240, 6.223423)],
        [(0, 10.9511), (120, 6.7012)],
        [(0, 8.3916e-07), (120, 1.0154e-04), (240, 2.0224e-04)],
    ),
    "build_nanogpt_file": (
        BUILD_NANOGPT_FILE,
        [(0, 10.955029), (120, 6.847876), (250, 6.15001)],
        [(0, 10.9511), (250, 6.1004)],
        [],
    ),
    "llm_c": (
        LLM_C,
        [(1, 11.009054), (21, 9.561233), (22, 9.512001)],
        [(0, 11.00914), (21, 9.512345)],
        [(1, 3e-06), (21, 6.3e-05), (22, 6.6e-05)],
    ),
    "llm_c_main": (
        LLM_C_MAIN,
        [(1, 10.9598), (2, 10.8556), (250, 6.5)],
        [(0, 11.0091), (250, 6.4512)],
        [(1, 1e-06), (2, 2e-06), (250, 1.8e-04)],
    ),
    "modded_nanogpt": (
        MODDED,
        [(10, 7.1003), (125, 4.6012)],
        [(0, 10.8258), (125, 4.45776)],
        [],
    ),
    "megatron": (
        MEGATRON,
        [(100, 9.100123), (200, 8.220456)],
        [(200, 8.15)],
        [(100, 1.5e-06), (200, 3e-06)],
    ),
    "hugging_face": (
        HF_STDOUT,
        [(None, 2.3011), (None, 2.1503)],
        [(None, 2.2004)],
        [(None, 5e-05), (None, 2.5e-05)],
    ),
    "word_language_model": (
        WORD_LM,
        [(200, 7.64), (400, 6.87), (1200, 5.90)],
        [(1000, 5.61), (2000, 5.20)],
        [(200, 20), (400, 20), (1200, 20)],
    ),
    "fairseq": (
        FAIRSEQ,
        [(200, 10.881), (400, 9.410), (600, 8.801)],
        [(400, 9.103)],
        [(200, 2.5e-05), (400, 5e-05), (400, 5e-05), (600, 7.5e-05)],
    ),
    "fairseq_old": (
        FAIRSEQ_OLD,
        [(445, 9.1), (890, 7.9)],
        [(445, 8.2)],
        [(445, 1e-4), (890, 2e-4)],
    ),
    "fairseq_json": (FAIRSEQ_JSON, [(200, 10.881)], [(400, 9.103)], [(200, 2.5e-05)]),
    "progress_bar": (LIGHTNING_BAR, [(20, 8.8), (60, 8.4), (120, 7.8), (160, 7.4)], [], []),
    "prefixes_and_colours": (
        PREFIXED,
        [(10, 9.5), (1020, 8.25), (1030, 8.125)],
        [],
        [(10, 1e-4), (1020, 2e-4), (1030, 3e-4)],
    ),
}


def expect(log, train, valid, lr):
    for name, wanted in (("train/loss", train), ("valid/loss", valid), ("optim/lr", lr)):
        found = column(log, name)
        assert len(found) == len(wanted), (name, found, log.summary)
        for got, want in zip(found, wanted, strict=True):
            assert got == (want[0], pytest.approx(want[1], nan_ok=True)), (name, found)


@pytest.mark.parametrize("name", CONSOLE)
def test_what_trainers_print(tmp_path, name):
    text, *wanted = CONSOLE[name]
    log = read_log(write(tmp_path, text))
    expect(log, *wanted)
    assert log.kind == "console text" and not log.problems
    assert "train/loss" in log.columns.values() and "train/loss" in log.summary


def test_the_other_columns_of_what_trainers_print(tmp_path):
    nanogpt = read_log(write(tmp_path, NANOGPT))
    assert column(nanogpt, "perf/mfu") == [(10, 0.361), (20, 0.3612), (30, 0.3612)]
    assert column(nanogpt, "train loss") == [(0, 10.9871), (20, 8.879)]
    assert any("loss was taken for train/loss, not train loss" in note for note in nanogpt.notes)
    assert nanogpt.columns["iter"] == "step" and "time" in nanogpt.ignored
    llm_c = read_log(write(tmp_path, LLM_C))
    assert column(llm_c, "perf/mfu") == [(1, 0.401), (21, 0.416), (22, 0.416)]
    assert column(llm_c, "perf/tokens_per_second") == [(1, 232e3), (21, 415e3), (22, 1.2e6)]
    assert column(llm_c, "optim/grad_norm")[1] == (21, 3.1022)
    megatron = read_log(write(tmp_path, MEGATRON))
    assert column(megatron, "optim/grad_norm") == [(100, 5.201), (200, 3.113)]
    assert column(megatron, "optim/skipped_updates") == [(100, 0), (200, 0)]
    assert column(megatron, "valid/token_ppl") == [(200, pytest.approx(3463.374))]
    build = read_log(write(tmp_path, BUILD_NANOGPT))
    assert column(build, "perf/tokens_per_second")[1] == (120, 1259389.92)
    words = read_log(write(tmp_path, WORD_LM))
    assert column(words, "data/epoch")[:3] == [(200, 0.2), (400, 0.4), (1000, 1.0)]
    assert column(words, "train/token_ppl")[0] == (200, 2079.22)
    assert column(words, "test/loss") == [(2000, 5.11)]
    fairseq = read_log(write(tmp_path, FAIRSEQ))
    assert column(fairseq, "whole loss") == [(400, 10.120)]
    assert column(fairseq, "data/epoch")[0] == (200, 0.5)


# JSON

ROWS = [
    {"step": 10, "loss": 9.5, "learning_rate": 1e-4, "epoch": 0.1},
    {"step": 20, "loss": 8.5, "learning_rate": 2e-4, "epoch": 0.2},
    {"step": 20, "eval_loss": 8.75, "epoch": 0.2},
]
NESTED = [
    {"step": 10, "train": {"loss": 9.5, "lr": 1e-4}},
    {"step": 20, "train": {"loss": 8.5, "lr": 2e-4}, "valid": {"loss": 8.75}},
]
BY_NAME = {
    "steps": [10, 20],
    "train_loss": [9.5, 8.5],
    "lr": [1e-4, 2e-4],
    "val_steps": [20],
    "val_loss": [8.75],
}
LLAMA_FACTORY = [
    {"current_steps": 10, "total_steps": 90, "loss": 9.5, "lr": 1e-4, "elapsed_time": "0:00:21"},
    {"current_steps": 20, "total_steps": 90, "loss": 8.5, "lr": 2e-4, "elapsed_time": "0:00:42"},
    {"current_steps": 20, "total_steps": 90, "eval_loss": 8.75, "elapsed_time": "0:00:44"},
]
OWN = [
    {"step": 10, "train/loss": 9.5, "optim/lr": 1e-4, "perf/mfu": 0.3},
    {"step": 20, "train/loss": 8.5, "optim/lr": 2e-4},
    {"step": 20, "valid/loss": 8.75, "valid/token_ppl": None},
]
DOCUMENTS = {
    "trainer_state.json": {"best_metric": None, "epoch": 0.2, "log_history": ROWS, "max_steps": 90},
    "list.json": ROWS,
    "history.json": {"config": {"lr": 0.1, "sizes": [1, 2, 3, 4]}, "history": ROWS},
    "nested.json": NESTED,
    "by_name.json": BY_NAME,
    "by_split.json": {
        "train": [{"step": 10, "loss": 9.5, "lr": 1e-4}, {"step": 20, "loss": 8.5, "lr": 2e-4}],
        "valid": [{"step": 20, "loss": 8.75}],
    },
    "columns_by_split.json": {
        "history": {
            "train": {"step": [10, 20], "loss": [9.5, 8.5], "lr": [1e-4, 2e-4]},
            "eval": {"step": [20], "loss": [8.75]},
        }
    },
    "by_step.json": {
        "10": {"loss": 9.5, "lr": 1e-4},
        "20": {"loss": 8.5, "lr": 2e-4, "val_loss": 8.75},
    },
    "plural.json": {"iters": [10, 20], "train_losses": [9.5, 8.5], "lrs": [1e-4, 2e-4]}
    | {"val": {"iters": [20], "losses": [8.75]}},
    "pairs.json": {
        "loss": [[10, 9.5], [20, 8.5]],
        "lr": [[1.7e9, 10, 1e-4], [1.7e9, 20, 2e-4]],
        "val_loss": [[20, 8.75]],
    },
}
LINES = {
    "trainer_log.jsonl": LLAMA_FACTORY,
    "metrics.jsonl": OWN,
    "nested.jsonl": NESTED,
    "history.jsonl": [
        {"_step": 0, "trainer/global_step": 10, "_runtime": 3.5, "_timestamp": 1.7e9} | ROWS[0],
        {"_step": 1, "trainer/global_step": 20, "_runtime": 4.5, "_timestamp": 1.7e9} | ROWS[1],
        {"_step": 2, "trainer/global_step": 20, "_runtime": 4.5, "eval/loss": 8.75},
    ],
    "split.jsonl": [
        {"split": "train", "step": 10, "loss": 9.5, "lr": [1e-4, 1e-4]},
        {"split": "train", "step": 20, "loss": 8.5, "lr": [2e-4, 2e-4]},
        {"context": {"split": "val"}, "step": 20, "loss": 8.75},
    ],
    "structured.jsonl": [
        {"level": "INFO", "data": {"global_step": 10, "loss": 9.5, "lr": "1e-4"}},
        {"level": "INFO", "data": {"global_step": 20, "loss": 8.5, "lr": "2e-4"}},
        {"level": "INFO", "data": {"global_step": 20, "eval_loss": 8.75}},
    ],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_of_any_nesting(tmp_path, name):
    log = read_log(write(tmp_path, json.dumps(DOCUMENTS[name], indent=2), name))
    expect(log, *WANTED)
    assert log.kind == "JSON"


@pytest.mark.parametrize("name", LINES)
def test_json_lines(tmp_path, name):
    text = "".join(json.dumps(row) + "\n" for row in LINES[name])
    log = read_log(write(tmp_path, text, name))
    expect(log, *WANTED)
    assert log.kind == "JSON lines"
    assert not {"_runtime", "_timestamp", "total_steps", "elapsed_time"} & set(log.columns)


def test_what_python_prints_of_a_list(tmp_path):
    for document in (ROWS, BY_NAME, {"log_history": [*ROWS[:2], {**ROWS[2], "x": None, "y": nan}]}):
        expect(read_log(write(tmp_path, str(document))), *WANTED)


def test_the_history_of_keras(tmp_path):
    history = {"loss": [2.5, 2.25], "accuracy": [0.4, 0.5], "val_loss": [2.75, 2.5]}
    pandas = {name: {str(i): x for i, x in enumerate(xs)} for name, xs in history.items()}
    for document in (history, pandas):
        log = read_log(write(tmp_path, json.dumps(document)))
        expect(log, [(None, 2.5), (None, 2.25)], [(None, 2.75), (None, 2.5)], [])
    text = "epoch,accuracy,loss,lr,val_accuracy,val_loss\n0,0.4,2.5,0.01,0.3,2.75\n"
    log = read_log(write(tmp_path, text + "1,0.5,2.25,0.01,0.4,2.5\n", "training.csv"))
    assert column(log, "train/loss", "data/epoch") == [(0, 2.5), (1, 2.25)]
    assert column(log, "valid/accuracy", "data/epoch") == [(0, 0.3), (1, 0.4)]


# Tables

TABLES = {
    "plain.csv": "step,loss,val_loss,lr\n10,9.5,,1e-4\n20,8.5,8.75,2e-4\n",
    "bom.csv": "\ufeffiter,train loss,valid loss,lr\r\n10,9.5,,1e-4\r\n20,8.5,8.75,2e-4\r\n",
    "tabs.tsv": "Step\tTraining Loss\tValidation Loss\tlr\n10\t9.5\t\t1e-4\n20\t8.5\t8.75\t2e-4\n",
    "semicolons.csv": "step;loss;val_loss;lr\n10;9,5;;0,0001\n20;8,5;8,75;0,0002\n",
    "blanks.txt": "step  loss  val_loss  lr\n10  9.5  null  1e-4\n20  8.5  8.75  2e-4\n",
    "quoted.csv": '"step","loss, nats","val_loss","lr"\n"10","9.5","","1e-4"\n20,8.5,8.75,2e-4\n',
    "lightning.csv": "epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss\n"
    "0,,10,,9.5,\n,1e-4,10,,,\n0,,20,,8.5,\n,2e-4,20,,,\n0,,20,,,8.75\n0,,20,9.0,,\n",
    "wandb.csv": '"Step","brisk-sun-7 - train/loss","brisk-sun-7 - train/loss__MIN",'
    '"brisk-sun-7 - train/loss__MAX","brisk-sun-7 - eval/loss","brisk-sun-7 - train/learning_rate"'
    '\n"10","9.5","9.4","9.6","","1e-4"\n"20","8.5","8.4","8.6","8.75","2e-4"\n',
    "sep.csv": "sep=;\nstep;loss;val_loss;lr\n10;9,5;;0,0001\n20;8,5;8,75;0,0002\n",
    "pipes.csv": "step|loss|val_loss|lr\n10|9.5||1e-4\n20|8.5|8.75|2e-4\n",
    "card.md": "| Step | Training Loss | Validation Loss | lr |\n|:---:|:---:|:---:|:---:|\n"
    "| 10 | 9.5 | No log | 1e-4 |\n| 20 | 8.5 | 8.75 | 2e-4 |\n",
    "rich.txt": "┏━━━━┳━━━━┓\n┃ step ┃ loss ┃ val_loss ┃ lr ┃\n┡━━━━╇━━━━┩\n"
    "│ 10 │ 9.5 │ - │ 1e-4 │\n│ 20 │ 8.5 │ 8.75 │ 2e-4 │\n└────┴────┘\n",
    "notebook.txt": "Step Training Loss Validation Loss lr\n10 9.5 null 1e-4\n20 8.5 8.75 2e-4\n",
    "pandas.txt": "   step  loss  val_loss      lr\n0    10   9.5      None  0.0001\n"
    "1    20   8.5      8.75  0.0002\n",
    "trailing.csv": "step,loss,val_loss,lr\n10,9.5,,1e-4,\n20,8.5,8.75,2e-4,\n",
    "savetxt.txt": "# step loss val_loss lr\n10 9.5 null 1e-4\n20 8.5 8.75 2e-4\n",
    "units.csv": "step,loss,val_loss,lr\n0.01k,9.5,,1e-4\n0.02k,8.5,8.75,2e-4\n",
    "long.csv": "step,metric,value\n10,loss,9.5\n10,lr,1e-4\n20,loss,8.5\n20,lr,2e-4\n"
    "20,val_loss,8.75\n",
    "split.csv": "split,step,loss,lr\ntrain,10,9.5,1e-4\ntrain,20,8.5,2e-4\nval,20,8.75,\n",
    "history.csv": "_runtime,_step,_timestamp,loss,eval_loss,learning_rate\n"
    "3.5,10,1700000000,9.5,,1e-4\n4.5,20,1700000001,8.5,,2e-4\n4.6,20,1700000001,,8.75,\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    log = read_log(write(tmp_path, TABLES[name], name))
    expect(log, *WANTED)
    assert not log.problems and not any("__M" in column for column in log.columns)


def test_numbers_in_groups(tmp_path):
    thousands = 'step,loss,tokens\n"1,000",9.5,"524,288,000"\n"2,000",8.5,"1,048,576,000"\n'
    german = "step;loss;tokens\n1.000;9,503;524.288.000\n2.000;8,5;1.048.576.000\n"
    english = "step;loss;tokens\n1,000;9.503;524,288,000\n2,000;8.5;1,048,576,000\n"
    for text in (thousands, german, english):
        log = read_log(write(tmp_path, text, "log.csv"))
        assert column(log, "train/loss") == [(1000, pytest.approx(9.5, abs=0.004)), (2000, 8.5)]
        assert column(log, "data/tokens") == [(1000, 524288000), (2000, 1048576000)]


def test_a_header_that_is_repeated_after_a_resume(tmp_path):
    text = "step,loss,lr\n10,9.5,1e-4\n20,8.5,2e-4\nstep,loss,lr\n10,9.25,1e-4\n"
    log = read_log(write(tmp_path, text, "log.csv"))
    assert column(log, "train/loss") == [(10, 9.5), (20, 8.5), (10, 9.25)] and not log.problems
    text += "step,lr,loss\n30,3e-4,8.0\n"
    log = read_log(write(tmp_path, text, "log.csv"))
    assert column(log, "train/loss")[-1] == (30, 8.0) and not log.problems


def test_steps_that_begin_anew_in_every_epoch_count_on(tmp_path):
    rows = [f"{epoch},{step},{3 - epoch - step / 99}" for epoch in (1, 2) for step in (10, 20, 30)]
    log = read_log(write(tmp_path, "\n".join(["epoch,step,loss", *rows]), "log.csv"))
    assert [step for step, _ in column(log, "train/loss")] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    "name, metric",
    [
        ("run-.-tag-Loss_train.csv", "train/loss"),
        ("run-validation-tag-epoch_loss.csv", "valid/loss"),
        ("run-may_3-tag-eval_loss.csv", "valid/loss"),
        ("download.csv", "train/loss"),
    ],
)
def test_a_table_of_tensorboard(tmp_path, name, metric):
    text = "Wall time,Step,Value\n1700000000.5,10,9.5\n1700000001.5,20,8.5\n"
    log = read_log(write(tmp_path, text, name))
    assert column(log, metric) == WANTED[0] and log.ignored == ["Wall time"]


def test_one_file_for_every_metric(tmp_path):
    names = ("train_loss", "val_loss", "lr", "epoch_time")
    for run, length in (("a", 2), ("b", 1)):
        for name, rows in zip(names, [*WANTED, BAR], strict=True):
            text = "".join(f"1700000000.5,{step},{x}\n" for step, x in rows[:length])
            write(tmp_path, f"Wall time,Step,Value\n{text}", f"csv/run-{run}_tag-{name}.csv")
    expect(log := read_log(tmp_path / "csv"), *WANTED)
    assert log.columns["run-a_tag-val_loss.csv"] == "valid/loss" and "csv: a, not b" in log.summary
    with pytest.raises(ValueError, match="names no loss"):
        read_log(tmp_path / "csv" / "run-a_tag-epoch_time.csv")
    for name, rows in zip(names, WANTED, strict=False):
        text = "".join(f"1700000000500 {x} {step}\n" for step, x in rows)
        write(tmp_path, text, f"mlruns/0/metrics/{name}")
    expect(read_log(tmp_path / "mlruns"), *WANTED)


def test_of_several_runs_of_tensorboard_one_is_taken(tmp_path):
    for run, rows in (("a", BAR), ("b", BAR[:1])):
        for split, name in (("train", "loss"), ("validation", "loss")):
            with SummaryWriter(str(tmp_path / run / split)) as writer:
                for step, x in rows:
                    writer.add_scalar(name, x + (split == "validation"), step)
    log = read_log(tmp_path)
    expect(log, BAR, [(10, 10.5), (20, 9.5)], [])
    assert f"taken of {tmp_path}: a, not b" in log.summary


def test_events_of_tensorboard(tmp_path):
    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step, x in WANTED[0]:
            writer.add_scalar("Loss/train", x, step)
            writer.add_scalar("lr", 1e-5 * step, step)
        writer.add_scalar("Loss/val", 8.75, 20)
        writer.add_text("config", "lr = 1", 0)
    for path in (tmp_path, tmp_path / "a", next((tmp_path / "a").iterdir())):
        log = read_log(path)
        expect(log, *WANTED)
        assert log.kind == "TensorBoard events"
    for split, x in (("train", 9.5), ("validation", 9.75)):  # as Keras writes them
        with SummaryWriter(str(tmp_path / "b" / split)) as writer:
            writer.add_scalar("epoch_loss", x, 1)
            writer.add_scalar("epoch_loss", x - 1, 2)
    expect(read_log(tmp_path / "b"), [(1, 9.5), (2, 8.5)], [(1, 9.75), (2, 8.75)], [])


def test_without_tensorboard_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 9.5, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install tensorboard"):
        read_log(tmp_path)


# Names


def test_the_surer_of_two_names_counts_and_it_is_said(tmp_path):
    log = read_log(write(tmp_path, "step,loss,train_loss\n1,3.5,2.5\n2,3.25,2.25\n", "log.csv"))
    assert column(log, "train/loss") == [(1, 2.5), (2, 2.25)]
    assert column(log, "loss") == [(1, 3.5), (2, 3.25)]  # stays, for whoever looks at every loss
    assert "train_loss was taken for train/loss, not loss" in log.summary


def test_what_looks_like_a_loss_keeps_its_name(tmp_path):
    names = ["aux_loss", "kd/kl", "z_loss", "bpb"]
    text = f"it,loss,{','.join(names)},time,host\n1,3.5,1,2,3,4,5,a\n2,3.25,1,2,3,4,6,a\n"
    log = read_log(write(tmp_path, text, "log.csv"))
    assert set(log.records[0]) == {"step", "train/loss", *names}
    assert log.ignored == ["time", "host"]
    assert log.columns == {"it": "step", "loss": "train/loss"} | {name: name for name in names}


def test_of_several_runs_the_longest_is_taken(tmp_path):
    text = "Step,a - train/loss,b - train/loss\n1,3.5,\n2,3.25,2.5\n3,3.0,2.25\n4,2.9,\n"
    log = read_log(write(tmp_path, text, "wandb.csv"))
    assert column(log, "train/loss") == [(1, 3.5), (2, 3.25), (3, 3.0), (4, 2.9)]
    assert "a - train/loss was taken for train/loss, not b - train/loss" in log.summary


@pytest.mark.parametrize(
    "name, metric",
    [
        ("train_loss", "train/loss"),
        ("training_loss", "train/loss"),
        ("loss/train", "train/loss"),
        ("lm loss", "train/loss"),
        ("tr_loss", "train/loss"),
        ("trl", "train/loss"),
        ("metrics/train/LanguageCrossEntropy", "train/loss"),
        ("trainLoss", "train/loss"),
        ("metrics/loss", "train/loss"),
        ("val_loss", "valid/loss"),
        ("eval_loss", "valid/loss"),
        ("validation/loss", "valid/loss"),
        ("val/loss", "valid/loss"),
        ("tel", "valid/loss"),
        ("test_ppl", "test/token_ppl"),
        ("val_ppl", "valid/token_ppl"),
        ("eval/perplexity", "valid/token_ppl"),
        ("val_acc", "valid/accuracy"),
        ("lr-AdamW/pg1", "optim/lr"),
        ("train/learning_rate", "optim/lr"),
        ("gradient_norm", "optim/grad_norm"),
        ("loss scale", "optim/loss_scale"),
        ("num_input_tokens_seen", "data/tokens"),
        ("tokens_per_sec", "perf/tokens_per_second"),
        ("tok/s", "perf/tokens_per_second"),
        ("MFU", "perf/mfu"),
    ],
)
def test_names_of_columns(tmp_path, name, metric):
    log = read_log(write(tmp_path, f"global_step,{name}\n1,3.5\n2,3.25\n", "log.csv"))
    assert log.columns == {"global_step": "step", name: metric}


@pytest.mark.parametrize("name", ["step", "it", "iter", "iteration", "iterations", "global_step"])
def test_names_of_the_step(tmp_path, name):
    log = read_log(write(tmp_path, f"{name},loss\n1,3.5\n2,3.25\n", "log.csv"))
    assert column(log, "train/loss") == [(1, 3.5), (2, 3.25)]


def test_names_that_only_the_user_knows(tmp_path):
    path = write(tmp_path, "at 10 crit 9.5\nat 20 crit 8.5 on validation crit_v 8.75\n")
    with pytest.raises(ValueError, match="--map"):
        read_log(path)
    path = write(tmp_path, "tick 10 crit 9.5\ntick 20 crit 8.5\ntick 20 crit_v 8.75\n")
    log = read_log(path, {"step": "tick", "loss": "crit", "valid_loss": "crit_v"})
    expect(log, *WANTED[:2], [])


def test_a_step_that_another_one_beats_is_ignored(tmp_path):
    log = read_log(write(tmp_path, "iter,step,loss\n100,10,9.5\n200,20,8.5\n", "log.csv"))
    assert column(log, "train/loss") == WANTED[0] and log.ignored == ["iter"]


@pytest.mark.parametrize("name", ["time", "valid/lr", "eval_tokens_per_second", "sec/step", "seed"])
def test_names_that_are_no_metric(tmp_path, name):
    log = read_log(write(tmp_path, f"step,loss,{name}\n1,3.5,1\n2,3.25,1\n", "log.csv"))
    assert log.ignored == [name]


# Lines that are broken, nulls, --map


def test_nan_that_pandas_writes_is_not_logged(tmp_path):
    rows = [{"step": i, "loss": 9 - i, "val_loss": 9 - i if i % 3 == 0 else nan} for i in range(9)]
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        log = read_log(write(tmp_path, text))
        assert len(column(log, "valid/loss")) == 3 and len(column(log, "train/loss")) == 9
    rows = [{"step": i, "loss": 9.0 if i % 4 == 0 else nan, "val_loss": 9.0} for i in range(12)]
    printed = "".join(f"step {row['step']} loss {row['loss']}\n" for row in rows)
    for text in (json.dumps(rows), printed):  # poisoned batches
        assert len(column(read_log(write(tmp_path, text)), "train/loss")) == 12


def test_a_jsonl_file_with_broken_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "loss": 9.5}\nloss\n[1]\n{"step": 2, "loss": 9.1}\n{"step": 3, "lo'
    )
    log = read_log(path, {"loss": "loss"})
    assert [row["train/loss"] for row in log.records] == [9.5, 9.1]
    assert [p.line for p in log.problems] == [2, 3, 5]
    report = examine_log(log.records, problems=log.problems)
    assert report.failed == ["log.readable"]
    assert report["log.readable"].values["lines"] == [2, 3, 5]


def test_a_last_line_cut_off_warns(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "train/loss": 9.5}\n{"step": 2, "tr')
    log = read_log(path)
    report = examine_log(log.records, problems=log.problems)
    assert not report.failed and report.warned == ["log.readable"]


@pytest.mark.parametrize("comma", [",", "\t"])
def test_a_csv_file(tmp_path, comma):
    lines = ["iter,train_loss,val_loss,lr", "10,9.5,,1e-3", "20,nan,8.25,2e-3", "30,9"]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines).replace(",", comma) + "\n")
    mapping = {"step": "iter", "loss": "train_loss", "valid_loss": "val_loss"}
    log = read_log(path, mapping)
    assert log.records[0] == {"step": "10", "train/loss": "9.5", "optim/lr": "1e-3"}
    assert log.records[1]["valid/loss"] == "8.25" and [p.line for p in log.problems] == [4]
    report = examine_log(log.records)
    assert report["log.finite"].values["found"]["train/loss"]["first_step"] == 20


def test_null_in_a_foreign_log_is_not_logged(tmp_path):
    """As of an outer join: rows of training and of evaluation, each without the other's columns."""
    path = tmp_path / "log.jsonl"
    rows = [{"step": i, "train/loss": 3.0, "valid/loss": None} for i in range(40)]
    for i in range(0, 40, 10):
        rows.insert(i + i // 10, {"step": i, "train/loss": None, "valid/loss": 3.1})
    rows[5]["optim/lr"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    log = read_log(path)
    assert sum("train/loss" in row for row in log.records) == 40
    found = examine_log(log.records)["log.finite"].values["found"]
    assert list(found) == ["optim/lr"]  # logged once, and null
    assert "log.finite" in examine_log(read_log(path, null_is_nan=True).records).failed
    rows = [{"step": i, "train/loss": None if i > 20 else 3.0} for i in range(60)]  # poisoned
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "log.finite" in examine_log(read_log(path).records).failed


@pytest.mark.parametrize("start", ["\ufeff", "\n", "# made by x\n", "\ufeff\n# made by x\n\n"])
def test_what_may_stand_before_the_first_row(tmp_path, start):
    path = tmp_path / "log"
    for text in ("step,train/loss\n1,2.0\n2,2.5,7\n", '{"step": 1, "train/loss": 2.0}\n?\n'):
        path.write_text(start + text, encoding="utf-8")
        log = read_log(path, {"step": "step"})
        assert [float(row["train/loss"]) for row in log.records] == [2.0]
        last = len((start + text).splitlines())
        assert [p.line for p in log.problems] == [last]


def test_a_metric_given_twice_is_refused(tmp_path):
    path = write(tmp_path, '[{"step": 1, "train/loss": 2.0}]', "log.json")
    with pytest.raises(ValueError, match="train/loss"):
        read_log(path, {"loss": "a", "train/loss": "b"})
    with pytest.raises(ValueError, match="column 'a'"):
        read_log(path, {"loss": "a", "lr": "a"})


def test_numbers_of_too_many_digits(tmp_path):
    for digits in (400, 5000):
        text = (
            '{"step": 1, "train/loss": 2.0}\n' + f'{{"step": 2, "train/loss": 1{"0" * digits}}}\n'
        )
        log = read_log(write(tmp_path, text))
        report = examine_log(log.records, problems=log.problems)
        assert report.failed if digits == 400 else report.warned == ["log.readable"]


def test_a_wrong_mapping_is_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match="train_loss.*choose from loss, step"):
        read_log(path, {"loss": "train_loss"})
    with pytest.raises(ValueError, match="did you mean 'valid/loss'"):
        read_log(path, {"val/loss": "loss"})
    with pytest.raises(ValueError, match="did you mean 'loss'"):
        read_log(path, {"los": "loss"})


# Folders


def test_a_folder_with_several_logs(tmp_path):
    write(tmp_path, json.dumps({"lr": 1e-4, "steps": 90}), "config.json")
    write(tmp_path, "# A run\nIt went well: the loss is low.\n", "notes.txt")
    write(tmp_path, TABLES["plain.csv"], "version_0/metrics.csv")
    write(tmp_path, NANOGPT, "train.log")
    log = read_log(tmp_path)
    assert len(column(log, "train/loss")) == 4
    assert "train.log, not version_0/metrics.csv" in log.summary
    (tmp_path / "train.log").unlink()
    expect(read_log(tmp_path), *WANTED)


def test_a_run_of_this_trainer(tmp_path):
    write(tmp_path, "".join(json.dumps(row) + "\n" for row in OWN), "metrics.jsonl")
    write(tmp_path, '{"perplexity": 6310.7, "references": {"unigram": 700.0}}', "eval_valid.json")
    expect(read_log(tmp_path), *WANTED)


# What cannot be read

UNREADABLE = {
    "empty.csv": (b"", "empty.csv is empty"),
    "blank.txt": (b"\n \n\t\n", "blank.txt is empty"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 9, "binary file"),
    "weights.bin": (bytes(1000), "binary file"),
    "packed.gz": (b"\x1f\x8b\x08\0" + bytes(range(128, 256)) * 4, "binary file"),
    "prose.txt": (
        b"The loss fell, then rose.\nWe stopped, and went home.\n",
        "console text without",
    ),
    "code.py": (b"import os\n\ndef f(x):\n    return 3 * x, 4\n", "console text without"),
    "config.json": (b'{"lr": 0.001, "layers": [4, 4], "name": "a"}', "names no loss.*--map"),
    "cut.json": (b'{\n "log_history": [\n  {\n   "loss": 3.5,\n   "st', "looks like JSON"),
    "numbers.json": (b"[1, 2, 3]", "looks like JSON"),
    "null.json": (b"{}", "looks like JSON"),
    "names.csv": (b"name,colour\na,red\nb,blue\n", "console text without"),
    "others.csv": (b"width,height\n3,4\n5,6\n", r"names no loss among.*\(width, height\).*--map"),
    "header.csv": (b"step,loss\n", "console text without"),
    "bare.csv": (b"1,3.5\n2,3.25\n", "numbers without names"),
    "bits.csv": (b"step,bpb\n1,3.5\n2,3.25\n", "names no loss among"),
    "bracket.log": (b"[2026-01-01 10:00:00] done\n" * 3, "console text without"),
    "steps.txt": (b"step 1 done\nstep 2 done\n", "console text without a step and a loss"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_log(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_says_what_it_read(tmp_path, capsys):
    path = write(tmp_path, NANOGPT)

    def run(*flags):
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", *flags])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    code, out, _ = run(f"--log={path}")
    assert code == 1  # of the loss that is no number
    assert out.startswith("read 6 rows of console text: step, iter -> step, loss -> train/loss")
    code, out, _ = run(f"--log={tmp_path}", "--json", "--map=loss=train loss")
    found = json.loads(out)
    assert code == 1  # the other loss is looked at as well
    assert found["log"]["columns"]["train loss"] == "train/loss" and found["findings"]
    code, _, err = run(f"--log={write(tmp_path, 'no log', 'other.txt')}")
    assert code == 2 and "other.txt looks like console text" in err


def test_a_folder_without_a_log_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="holds no log"):
        read_log(tmp_path)
    with pytest.raises(OSError, match="nothing"):
        read_log(tmp_path / "nothing")


@pytest.mark.parametrize(
    "long", ["9" * 20_000, "a" * 20_000, "a b " * 9000, "1 " * 9000, "(" * 9000]
)
def test_a_long_line_takes_no_time(tmp_path, long):
    text = f"step 1 loss 3.5\n{long}\nloss {long}\nstep 2 loss 3.25\n"
    log = read_log(write(tmp_path, text))
    assert column(log, "train/loss")[0] == (1, 3.5) and column(log, "train/loss")[-1] == (2, 3.25)


def test_a_mutilated_log_is_read_or_refused(tmp_path):
    rng = random.Random(0)
    scraps = [
        "nan",
        "{",
        "]",
        '"',
        "\n",
        "\0",
        "1e999",
        "/0",
        "%",
        "9" * 3000,
        '"loss": {"a":',
        "é",
    ]
    texts = [text for text, *_ in CONSOLE.values()] + list(TABLES.values())
    texts += [json.dumps(document) for document in DOCUMENTS.values()]
    read = 0
    for _ in range(150):
        text = rng.choice(texts)
        for _ in range(rng.choice([1, 5, 20])):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(scraps) + text[at + rng.choice([0, 1, 9]) :]
        try:
            read += len(read_log(write(tmp_path, text)).records) > 0
        except ValueError as error:
            assert "log.txt" in str(error)
    assert read > 50


def test_text_of_another_system(tmp_path):
    path = write(tmp_path, NANOGPT.replace("\n", "\r\n"), encoding="utf-16")
    assert len(column(read_log(path), "train/loss")) == 4
    path = write(tmp_path, NANOGPT.replace(", time", ", durée"), encoding="latin-1")
    assert len(column(read_log(path), "train/loss")) == 4


def test_a_packed_log_is_read_as_far_as_it_goes(tmp_path):
    packed = gzip.compress("".join(f"step {i} loss {9 - i / 1e3}\n" for i in range(1000)).encode())
    path = tmp_path / "log.gz"
    for share, least in ((1.0, 1000), (0.7, 500)):
        path.write_bytes(packed[: int(len(packed) * share)])
        assert len(column(read_log(path), "train/loss")) >= least
