"""Mistakes on command lines, by kind: each ends at once in one sentence, and leaves every file as it was."""

import collections
import contextlib
import dataclasses
import errno
import functools
import importlib
import importlib.util
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

import experiments
from experiments import (
    autoencoder,
    cifar10,
    cnf,
    coloured_mnist,
    digits,
    earth,
    encode,
    export,
    fashion_mnist,
    latent,
    learned_solver,
    mnist,
    reflow,
    sample,
    sudoku,
    text,
    text_to_image,
    text_to_video,
    token_images,
    tokens2d,
    torus,
    toy2d,
)
from experiments import images as own_images
from experiments.lab import command_line, images, options
from experiments.lab.corpus import facts_of
from experiments.lab.experiment import Restored
from experiments.lab.options import option
from experiments.lab.training import config_to_json
from experiments.torchcfm_table import table
from fm_jax.data import images as data_images
from fm_jax.samplers import Adaptive
from fm_jax.samplers import sample as fm_sample
from fm_jax.train.checkpoint import CheckpointError
from fm_jax.train.folder import OF_DISK, lock_folder
from fm_jax.train.loop import NonFiniteLossError

ROOT = Path(__file__).parents[2]
MAINS = {
    **{
        module.__name__.split(".")[-1]: lambda module=module: module.main(module.CONFIG, module.__doc__)
        for module in (digits, mnist, fashion_mnist, cifar10, coloured_mnist)
    },
    "toy2d": toy2d.main,
    "text_to_image": text_to_image.main,
    "text_to_video": text_to_video.main,
    "autoencoder": autoencoder.main,
    "earth": earth.main,
    "encode": encode.main,
    "latent": latent.main,
    "cnf": cnf.main,
    "reflow": reflow.main,
    "sudoku": sudoku.main,
    "text": text.main,
    "token_images": token_images.main,
    "tokens2d": tokens2d.main,
    "torus": torus.main,
    "torchcfm_table": table.main,
    "learned_solver": learned_solver.main,
    "sample": sample.main,
    "data.images": data_images.main,
}
WORK = [(images, "train"), (toy2d, "train"), (cnf, "train"), (reflow, "fit"), (table, "references"), (table, "train")]
WORK += [
    (sudoku, "train"),
    (text, "train"),
    (token_images, "train"),
    (tokens2d, "train"),
    (earth, "train"),
    (torus, "train"),
    (learned_solver, "fit_solver"),
    (sample, "generate_many"),
    (data_images, "prepare"),
]

COUNTS = {
    "digits": "total-steps batch-size accumulate log-every save-every keep sample-every num-images num-samples steps "
    "sample-batch",
    "cifar10": "total-steps num-samples",
    "toy2d": "batch-size width depth num-samples",
    "text_to_image": "total-steps batch-size num-samples steps",
    "text_to_video": "total-steps num-samples",
    "autoencoder --dataset digits": "total-steps num-samples base-channels",
    "encode --dataset digits --autoencoder ae": "batch-size",
    "cnf": "steps width depth total-steps",
    "reflow": "rounds num-test steps batch-size reflow-pairs",
    "sudoku": "total-steps batch-size width depth num-samples",
    "text": "total-steps batch-size width depth num-samples per-step sample-batch",
    "token_images --dataset digits": "total-steps batch-size num-samples steps sample-batch",
    "tokens2d": "total-steps batch-size width depth steps num-samples sample-batch",
    "earth": "total-steps batch-size width depth frequencies",
    "torus": "total-steps batch-size dim width depth steps",
    "torchcfm_table": "num-test num-reference reuse ofm-steps ofm-reuse",
    "learned_solver --run toy": "num fine-steps iterations batch-size",
    "sample --run toy": "num steps",
}
HUGE = 99999999999999999999
AT_LEAST_TWO = {
    "digits": ["frames"],
    "toy2d": ["frames", "floor-repeats"],
    "reflow": ["floor-repeats"],
    "text": ["length"],
    "torus": ["num-samples"],
}
NUMBERS = {
    "digits --learning-rate": [("nan", "positive and finite"), ("inf", "positive and finite"), ("0", "positive")],
    "digits --clip-norm": [("0", "positive and finite"), ("inf", "positive and finite")],
    "digits --weight-decay": [("-1", "finite and not negative")],
    "digits --dropout": [("1", r"in \[0, 1\)"), ("nan", r"in \[0, 1\)")],
    "mnist --label-dropout": [("1.5", r"in \[0, 1\)")],
    "digits --guidance": [("nan", "a finite number"), ("inf", "a finite number")],
    "digits --time-shift": [("0", "positive and finite"), ("nan", "positive and finite")],
    "digits --first-shift": [("0", "positive and finite"), ("inf", "positive and finite")],
    "digits --tolerance": [(value, r"in \[1e-7, inf\)") for value in ("0", "nan", "1e-300", "9e-8")],
    "digits --solver ddim --eta": [("2", r"in \[0, 1\]")],
    "digits --solver churn --churn": [("-1", "finite and not negative")],
    "digits --solver euler_maruyama --diffusion": [("-1", "finite and not negative"), ("inf", "finite")],
    "coloured_mnist --text-dropout": [("1.5", r"in \[0, 1\)")],
    "text_to_image --text-dropout": [("1", r"in \[0, 1\)"), ("nan", r"in \[0, 1\)")],
    "text_to_video --text-dropout": [("-0.1", r"in \[0, 1\)")],
    "autoencoder --dataset digits --beta": [("-1", "finite and not negative"), ("nan", "finite")],
    "reflow --sigma": [("-0.1", r"in \(0, 1\)"), ("0", r"in \(0, 1\)")],
    "sudoku --learning-rate": [("0", "positive and finite"), ("nan", "positive and finite")],
    "text --temperature": [("0", "positive and finite"), ("inf", "positive and finite"), ("nan", "positive")],
    "text --top-p": [("0", r"in \(0, 1\]"), ("1.5", r"in \(0, 1\]")],
    "sample --run toy --temperature": [("-1", "positive and finite")],
    "sample --run toy --top-p": [("nan", r"in \(0, 1\]")],
    "earth --folder places --finest": [("0", r"in \[1, inf\)"), ("nan", r"in \[1, inf\)")],
    "torus --scale": [("0", "positive and finite"), ("inf", "positive and finite")],
    "torchcfm_table --bridge-sigma": [("0", "positive and finite")],
    "torchcfm_table --ema-decay": [("1", r"in \(0, 1\)")],
    "learned_solver --run toy --learning-rate": [("-1", "positive and finite")],
    "toy2d --tolerance": [("1e-300", r"in \[1e-7, inf\), got 1e-300")],
    "sample --run toy --tolerance": [("-1", r"in \[1e-7, inf\)")],
    "sample --run toy --solver ddim --eta": [("nan", r"in \[0, 1\]")],
    "sample --run toy --image a.png --strength": [(value, r"in \[0.01, 1\], got") for value in ("1e-9", "0", "1.5")],
}
BEYOND = 2**32
COMMON = "config.json results.json metrics.jsonl .lock"
TAKEN = {
    "digits": f"{COMMON} samples.png animation.gif loss.png",
    "toy2d": "config.json samples.png loss.png",
    "text_to_image": "config.json samples.png loss.png",
    "text_to_video": "config.json samples.png loss.png samples.gif",
    "cnf": "results.json density.png",
    "reflow": "reflow.md reflow.png",
    "sudoku": "results.json validity.png loss.png",
    "text": "config.json results.json data.json tokenizer.json samples.txt loss.png",
    "token_images --dataset digits": "config.json results.json data.json samples.png loss.png",
    "tokens2d": "results.json samples.png loss.png",
    "earth --folder places": "config.json results.json data.json globe.png loss.png",
    "torus": "results.json angles.png loss.png",
    "torchcfm_table": "config.json results.json table.md trajectories.png",
}

_TRAINING = {"total-steps": 9, "batch-size": 8, "log-every": 3, "save-every": 3}
OF_SMOKE = {
    "toy2d": _TRAINING | {"solver": "heun", "width": 9, "depth": 9, "num-samples": 9, "frames": 9, "floor-repeats": 9},
    "text_to_image": _TRAINING | {"solver": "heun", "num-samples": 9},
    "text_to_video": _TRAINING | {"total-steps": 200, "num-samples": 9, "num-frames": 4},
    "cnf": _TRAINING | {"steps": 9, "width": 9, "depth": 9, "num-samples": 9},
    "reflow": {"steps": 200, "batch-size": 9, "reflow-pairs": 9, "num-test": 9, "rounds": 3, "floor-repeats": 9},
    "sudoku": _TRAINING | {"steps": 9, "per-step": 9, "width": 16, "depth": 9, "num-samples": 9},
    "text": _TRAINING | {"total-steps": 200, "width": 16, "depth": 9, "length": 9, "num-samples": 9, "num-times": 4},
    "token_images --dataset digits": _TRAINING | {"total-steps": 200, "num-samples": 9, "num-times": 4, "steps": 9},
    "tokens2d": _TRAINING | {"steps": 9, "width": 9, "depth": 9, "num-samples": 9, "sample-batch": 9},
    "earth": _TRAINING
    | {"total-steps": 200, "width": 9, "depth": 9, "frequencies": 9, "finest": 9.0, "num-points": 99},
    "torus": _TRAINING | {"total-steps": 200, "dim": 9, "width": 9, "depth": 9, "num-samples": 9, "steps": 9},
    "torchcfm_table": {"steps": 200, "ofm-steps": 200, "reuse": 9, "num-test": 9, "num-reference": 9},
}

CASES: dict[str, list[tuple[str, str]]] = {
    "a count of 0": [
        (f"{command} --{name} 0", f"--{name} must be from 1 to [12][0-9]+, got 0")
        for command, names in COUNTS.items()
        for name in names.split()
    ]
    + [
        (f"{command} --{name} 1", f"--{name} must be from 2 to 1000000, got 1")
        for command, n in AT_LEAST_TWO.items()
        for name in n
    ]
    + [
        ("digits --first-steps -1", "--first-steps must be from 0 to 2147483647, got -1"),
        ("digits --warmup-steps -1", "--warmup-steps must be from 0 to 2147483647, got -1"),
        ("digits --total-steps -5", "--total-steps must be from 1 to 2147483647, got -5"),
        ("cnf --num-samples 3", "--num-samples must be from 4 to 1000000, got 3"),
        ("sudoku --steps 4 0", "each of --steps must be from 1 to 1000, got 0"),
        ("sudoku --per-step 0", "each of --per-step must be from 1 to 16, got 0"),
        ("earth --num-points 15", "--num-points must be from 16 to 1000000, got 15"),
        ("earth --split-seed -1", f"--split-seed must be from 0 to {2**32 - 1}, got -1"),
        ("learned_solver --run toy --calls 5 0", "each of --calls must be from 1 to 1000, got 0"),
        ("sample --run toy --class -1", "--class must be from 0 to 1000000, got -1"),
    ],
    "a count that no machine can hold": [
        (f"{command} --{name} {HUGE}", f"--{name} must be from [12] to [12][0-9]+, got {HUGE}")
        for command, names in COUNTS.items()
        for name in (*names.split(), *AT_LEAST_TWO.get(command, ()))
    ]
    + [
        ("digits --first-steps 2147483648", "--first-steps must be from 0 to 2147483647"),
        ("digits --warmup-steps 2147483648", "--warmup-steps must be from 0 to 2147483647"),
        ("toy2d --total-steps 2147483648", "--total-steps must be from 1 to 2147483647"),
        ("digits --batch-size 99999999999", "--batch-size must be from 1 to 1000000"),
        ("toy2d --solver heun --steps 1000000000000", "--steps must be from 1 to 1000000"),
        ("sample --run moons --solver heun --steps 1000000000000", "--steps must be from 1 to 1000000"),
        ("sudoku --per-step 17", "each of --per-step must be from 1 to 16, got 17"),
        ("learned_solver --run toy --calls 5 1001", "each of --calls must be from 1 to 1000, got 1001"),
    ],
    "a number out of range": [
        (f"{command} {value}", f"{command.split()[-1]} must be {wanted}")
        for command, values in NUMBERS.items()
        for value, wanted in values
    ]
    + [
        ("digits --ema-decays 0.9 1", r"each of --ema-decays must be in \(0, 1\), got 1.0"),
        ("digits --ema-decays nan", r"each of --ema-decays must be in \(0, 1\), got nan"),
        ("digits --ema-decays 0.9 0.9", "--ema-decays must be distinct, got 0.9 0.9"),
        ("digits --guidance-interval 0.8 0.2", r"--guidance-interval must be a pair \(low, high\)"),
        ("digits --guidance-interval 0 nan", r"--guidance-interval must be a pair \(low, high\)"),
        ("sample --run toy --guidance-interval 0 2", r"--guidance-interval must be a pair \(low, high\)"),
    ],
    "a seed": [
        (f"{command} {value}", f"--seed must be from 0 to {BEYOND - 1}, got {value}")
        for command in ("digits --seed", "toy2d --seed", "reflow --seed", "sample --run toy --seed")
        for value in (-1, BEYOND)
    ]
    + [
        (f"cnf --seed {BEYOND}", f"--seed must be from 0 to {BEYOND - 1}"),
        ("learned_solver --run toy --seed -1", f"--seed must be from 0 to {BEYOND - 1}, got -1"),
        (f"torchcfm_table --seeds 1 {BEYOND}", f"each of --seeds must be from 0 to {BEYOND - 1}, got {BEYOND}"),
        ("torchcfm_table --seeds 1 1", "--seeds must be distinct, got 1 1"),
    ],
    "not a value of that kind": [
        ("digits --batch-size 2.5", r"--batch-size: invalid literal for int\(\) with base 10: '2.5'"),
        ("digits --total-steps 1e3", r"--total-steps: invalid literal for int\(\)"),
        ("digits --learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
        ("digits --clip-norm abc", "--clip-norm: .* could not convert string to float: 'abc'"),
        ("digits --seed one", r"--seed: invalid literal for int\(\)"),
        ("torchcfm_table --seeds 1 x", r"--seeds: Could not find valid parse for arguments: \['1', 'x'\]"),
        ("sample --run toy --num many", r"--num: invalid literal for int\(\)"),
        ("sample --run toy --class cat", "--class: .*invalid literal for int"),
        ("digits --guidance-interval 0.5", "--guidance-interval.* Expected 2 values"),
        ("digits --batch-size", "Missing value for argument '--batch-size'"),
    ],
    "not one of the choices": [
        ("digits --solver nope", "--solver must be one of 'euler', .*, got 'nope'"),
        ("sample --run toy --solver nope", "--solver must be one of 'euler', .*, got 'nope'"),
        ("digits --path foo", "invalid choice 'foo' for argument '--path'"),
        ("digits --model unet", "invalid choice 'unet' for argument '--model'"),
        ("digits --prediction x", "invalid choice 'x' for argument '--prediction'"),
        ("digits --decay exponential", "invalid choice 'exponential' for argument '--decay'"),
        ("digits --guidance-rule none", "invalid choice 'none' for argument '--guidance-rule'"),
        ("toy2d --data spiral", "invalid choice 'spiral' for argument '--data'"),
        ("reflow --problem 'N to N'", "--problem must be one of 'N to 8gaussians', .*, got 'N to N'"),
        ("torchcfm_table --methods CFM", "each of --methods must be one of 'I-CFM', .*, got 'CFM'"),
        ("sudoku --loss elbo", "invalid choice 'elbo' for argument '--loss'"),
        ("text --loss elbo", "invalid choice 'elbo' for argument '--loss'"),
        ("text --position last", "invalid choice 'last' for argument '--position'"),
        ("text --solver heun", "invalid choice 'heun' for argument '--solver'"),
        ("sample --run toy --solver first_hitting", "--solver must be one of 'euler', .*, got 'first_hitting'"),
        ("sample --run play --solver heun", "--solver must be one of 'first_hitting', .*, got 'heun'"),
        ("sample --run toy --remask often", "invalid choice 'often' for argument '--remask'"),
        ("earth --data tsunami", "invalid choice 'tsunami' for argument '--data'"),
        ("earth --split random", "invalid choice 'random' for argument '--split'"),
        ("tokens2d --source noise", "invalid choice 'noise' for argument '--source'"),
        ("torchcfm_table --problems moons", "each of --problems must be one of 'N to 8gaussians', .*, got 'moons'"),
    ],
    "not an option, or none where one is needed": [
        ("digits --bath-size 3", "Unrecognized options: --bath-size"),
        ("digits now", "Unrecognized options: now"),
        ("toy2d --flip", "Unrecognized options: --flip"),
        ("sample", "--run"),
        ("learned_solver", "--run"),
        ("data.images", "arguments are required: name"),
        ("sudoku --per-step", "--per-step must have at least one value"),
        ("torchcfm_table --seeds", "--seeds must have at least one value"),
        ("torchcfm_table --problems", "--problems must have at least one value"),
        ("torchcfm_table --methods", "--methods must have at least one value"),
        ("learned_solver --run toy --calls", "--calls must have at least one value"),
    ],
    "values that do not fit together": [
        ("digits --total-steps 50", "--warmup-steps must be less than --total-steps, got 50 and 50"),
        ("digits --batch-size 127", "--batch-size must be a multiple of 4, the devices of this process, got 127"),
        ("toy2d --batch-size 6", "--batch-size must be a multiple of 4, the devices"),
        ("cnf --batch-size 6", "--batch-size must be a multiple of 4, the devices"),
        ("digits --accumulate 5", "--accumulate must divide the 32 examples .* each device, got 5"),
        ("toy2d --accumulate 3", "--accumulate must divide the 64 examples"),
        ("digits --batch-size 2000", "--batch-size must be at most 1500, the images to train on, got 2000"),
        ("digits --num-images 64", "--batch-size must be at most 64, the images to train on, got 128"),
        (
            "mnist --model cifar10",
            "--model cifar10 does not fit the images of mnist, 28x28x1: height and width must be divisible",
        ),
        ("digits --label-dropout 0", "--label-dropout must be above 0 for --guidance 2"),
        ("reflow --steps 150", "--steps must be a multiple of 100, .*, got 150"),
        ("text --width 20", "--width must be a multiple of 8, twice its 4 heads, got 20"),
        ("token_images --dataset digits --label-dropout 0", "--label-dropout must be above 0 for --guidance 2"),
        ("token_images --dataset digits --num-times 3", "--num-times must be even, two draws in each stratum, got 3"),
        ("token_images --dataset digits --levels 1", "--levels must be from 2 to 256, got 1"),
        ("token_images --dataset digits --levels 257", "--levels must be from 2 to 256, got 257"),
        (
            "token_images --dataset digits --labels none",
            "--labels must be given: samples are judged by their classes, got none",
        ),
        ("text --num-times 3", "--num-times must be a multiple of 2, two draws in each stratum, got 3"),
        (
            "text --length 99999",
            "--corpus must have at least 99999 characters in its last tenth, one piece of --length",
        ),
        (
            "text --loss next_token --position margin",
            "--position must be left out with --loss next_token, .* got margin",
        ),
        ("text --loss next_token --solver tau_leaping", "--solver must be left out with --loss next_token"),
        ("text --loss next_token --per-step 2", "--per-step must be left out with --loss next_token"),
        ("sudoku --width 20", "--width must be a multiple of 8, twice its 4 heads, got 20"),
        ("sudoku --batch-size 6", "--batch-size must be a multiple of 4, the devices"),
        ("earth --batch-size 6", "--batch-size must be a multiple of 4, the devices"),
        ("torus --total-steps 50", "--warmup-steps must be less than --total-steps, got 100 and 50"),
        ("torchcfm_table --ofm-steps 99", "--ofm-steps must be a multiple of 100, .*, got 99"),
        ("torchcfm_table --methods FM --problems 'moons to 8gaussians'", "--methods FM starts from noise"),
        ("toy2d --source moons --prediction noise", "--source moons needs --prediction velocity"),
        ("toy2d --source moons --solver ddim", "--source moons needs --prediction velocity and a solver such as heun"),
        ("sample --run play --solver mixture_steps --grid edm", "--grid must be one of 'uniform', 'mask_cosine', got"),
        ("sample --run control --position confidence", "--position must be left out with --loss next_token"),
        ("sample --run control --position random", "--position must be left out with this run, got random"),
        ("sample --run labelled", "--guidance must be 1 for a run with --label-dropout 0, .*, got 2"),
        ("sample --run moons --solver ddim", "--source moons needs --prediction velocity and a solver such as heun"),
        ("learned_solver --run toy --num 8", "--batch-size must be at most --num, got 64 and 8"),
        ("sample --run digits --class 1 --avoid 1", "--avoid must be another class than --class, got 1 for both"),
        ("sample --run digits --class 1 --also 1", "--also must be another class than --class, got 1 for both"),
        ("sample --run labelled --also 1", "--also needs what the network makes without a label, .* at any --guidance"),
        ("sample --run labelled --also 1 --guidance 1", "--also needs what the network makes without a label"),
        ("sample --run narrow --also 1", "--also goes with --guidance-rule extrapolate, and the run has rescale"),
        ("sample --run digits --also 1 --avoid 2", "--also and --avoid are 2 ways to guide: give one"),
        *(
            (f"sample --run toy --negative a --{way}", f"{wanted} are 2 ways to guide: give one")
            for way, wanted in [
                ("weak-run moons", "--negative and --weak-run"),
                ("avoid 3", "--avoid and --negative"),
                ("also 3", "--also and --negative"),
            ]
        ),
        ("sample --run toy --prompt a --negative a", "--negative must be another sentence than --prompt, got 'a'"),
        ("sample --run digits --also 1 --guidance-rule rescale", "--also goes with --guidance-rule extrapolate"),
        ("sample --run toy --solver heun --learned-solver a.npz", "--learned-solver takes the place of --solver"),
        (
            "sample --run toy --image a.png --strength 0.6 --learned-solver a.npz",
            "--learned-solver goes the whole way from noise, and --strength 0.6 a part of it: give one",
        ),
    ],
    "an option of no effect": [
        ("digits --eta 0.5", "--eta 0.5 would have no effect: --solver bosh3 does not take it; ddim would"),
        ("digits --solver ddpm --eta 0.5", "--eta 0.5 would have no effect: --solver ddpm does not take it"),
        ("digits --churn 1", "--churn 1.0 would have no effect"),
        ("digits --diffusion 1", "--diffusion 1.0 would have no effect"),
        ("digits --steps 50", "--steps 50 would have no effect: --solver bosh3 has adaptive steps"),
        ("digits --grid edm", "--grid edm would have no effect: --solver bosh3 has adaptive steps"),
        ("mnist --tolerance 1e-5", "--tolerance 1e-05 would have no effect: --solver heun has fixed steps"),
        ("digits --coupled-batches 4", "--coupled-batches 4 would have no effect: --coupling independent"),
        ("digits --reuse-pairs 4", "--reuse-pairs 4 would have no effect: --coupling independent"),
        ("digits --data-dir here", "--data-dir here would have no effect: only data sets of TFDS"),
        ("digits --guidance 1 --guidance-rule rescale", "--guidance-rule rescale would have no effect: --guidance 1"),
        ("digits --guidance 1 --guidance-interval 0.2 0.8", "--guidance-interval 0.2 0.8 would have no effect"),
        ("toy2d --sample-every 10", "--sample-every 10 would have no effect: toy2d draws nothing while it trains"),
        ("toy2d --sample-batch 10", "--sample-batch 10 would have no effect: toy2d draws its --num-samples at once"),
        ("toy2d --guidance 2", "--guidance 2.0 would have no effect: the points have no classes"),
        ("toy2d --reuse-pairs 2", "--reuse-pairs 2 would have no effect"),
        ("cnf --sample-every 10", "--sample-every 10 would have no effect: cnf draws nothing while it trains"),
        ("sudoku --sample-every 10", "--sample-every 10 would have no effect: sudoku draws nothing while it trains"),
        ("text --init-from toy", "--init-from toy would have no effect: text begins with parameters of its own"),
        (
            "token_images --dataset digits --init-from toy",
            "--init-from toy would have no effect: token_images begins with parameters",
        ),
        (
            "token_images --dataset digits --position first",
            "--position first would have no effect: --solver mixture_steps does not",
        ),
        ("text --guidance 2", "--guidance 2.0 would have no effect: a text has no classes"),
        (
            "text --steps 9",
            "--steps 9 would have no effect: --solver first_hitting does not take it; mixture_steps, tau",
        ),
        ("text --solver tau_leaping --remask cap", "--remask cap would have no effect: --solver tau_leaping does not"),
        ("text --loss next_token --num-times 4", "--num-times 4 would have no effect: --loss next_token has the like"),
        ("sample --run toy --position first", "--position first would have no effect: the run is on points"),
        *(
            (f"sample --run play --{name} {value}", f"--{name} {value} would have no effect: the run is on tokens")
            for name, value in [("eta", 0.5), ("churn", 1.0), ("avoid", 1), ("weak-run", "toy"), ("negative", "a")]
        ),
        ("sample --run play --guidance 2", "--guidance 2.0 would have no effect: the run has no classes. Leave it out"),
        ("sample --run play --steps 5", "--steps 5 would have no effect: --solver first_hitting does not take it"),
        ("sample --run toy --top-p 0.5", "--top-p 0.5 would have no effect: the run is on points"),
        ("cnf --init-from toy", "--init-from toy would have no effect: cnf begins with parameters of its own"),
        (
            "tokens2d --init-from toy",
            "--init-from toy would have no effect: tokens2d begins with parameters of its own",
        ),
        ("earth --init-from toy", "--init-from toy would have no effect: earth begins with parameters of its own"),
        ("torus --sample-every 10", "--sample-every 10 would have no effect: torus draws nothing while it trains"),
        ("sudoku --init-from toy", "--init-from toy would have no effect: sudoku begins with parameters of its own"),
        ("reflow --bridge-sigma 2", "--bridge-sigma 2.0 would have no effect: reflow has neither"),
        ("reflow --ofm-steps 100", "--ofm-steps 100 would have no effect"),
        ("torchcfm_table --methods I-CFM --ofm-reuse 2", "--ofm-reuse 2 would have no effect: none of --methods"),
        ("torchcfm_table --methods OFM --steps 100", "--steps 100 would have no effect: none of --methods"),
        (f"torchcfm_table --methods OFM --peer-python {sys.executable}", "--peer-python .* would have no effect"),
        ("sample --run toy --steps 5", "--steps 5 would have no effect: --solver dopri5 has adaptive steps"),
        ("sample --run toy --solver heun --eta 0.1", "--eta 0.1 would have no effect: --solver heun does not take it"),
        ("sample --run toy --guidance 2", "--guidance 2.0 would have no effect: the run has no classes"),
        ("sample --run digits --guidance 1 --avoid 3", "--avoid 3 would have no effect: --guidance 1 is none"),
        ("sample --run digits --learned-solver a.npz --steps 5", "--steps 5 would have no effect: --learned-solver"),
        ("sample --run digits --learned-solver a.npz --tolerance 1", "--tolerance 1.0 would have no effect"),
        ("sample --run digits --weak-run ./digits", "--weak-run digits would have no effect: it is the run itself"),
        (
            "sample --run digits --solver euler --steps 4 --guidance-interval 0.8 0.9",
            "--guidance-interval 0.8 0.9 would have no effect: --solver euler with --steps 4 never asks",
        ),
        ("sample --run digits --solver heun --steps 2 --guidance-interval 0.6 0.9", "with --steps 2 never asks"),
        (
            "sample --run digits --solver ddim --steps 4 --guidance-interval 0.999 1",
            "--solver ddim with --steps 4 never",
        ),
        ("sample --run digits --solver churn --steps 4 --guidance-interval 0.3 0.4", "--solver churn with --steps 4"),
        ("sample --run narrow --solver ab2 --steps 3", "--guidance-interval 0.8 0.9 would have no effect"),
        *(
            (
                f"sample --run digits --image a.png --strength 0.2 --guidance-interval 0 0.3 {solver}",
                "--guidance-interval 0 0.3 would have no effect: with --strength 0.2 sampling goes from 0.8 to 1",
            )
            for solver in ("", "--solver heun")
        ),
        (
            "sample --run digits --image a.png --strength 0.2 --solver euler --steps 2 --guidance-interval 0.82 0.88",
            "--guidance-interval 0.82 0.88 would have no effect: --solver euler with --steps 2 never asks",
        ),
        *(
            (f"{command} --smoke --{name} {value}", f"--{name} {value} would have no effect: --smoke has its own")
            for command, names in OF_SMOKE.items()
            for name, value in names.items()
        ),
        ("toy2d --smoke --eta 0.5 --solver ddim", "--solver ddim would have no effect: --smoke has its own"),
        ("toy2d --smoke --tolerance 0.5", "--tolerance 0.5 would have no effect: --smoke has its own --solver"),
        ("torchcfm_table --smoke --seeds 1 2", "--seeds 1 2 would have no effect: --smoke takes no more than 1"),
        ("torchcfm_table --smoke --problems 'N to moons' 'moons to N' 'N to N'", "--problems"),
    ],
    "an empty value": [
        *((f"{name} --run-dir ''", "--run-dir must not be empty") for name in ("digits", "cnf", "reflow", "toy2d")),
        ("torchcfm_table --run-dir=", "--run-dir must not be empty. Give a value, or leave it out"),
        ("torchcfm_table --peer-python ' '", "--peer-python must not be empty"),
        ("torchcfm_table --methods I-CFM ''", "--methods must not be empty"),
        ("mnist --data-dir ''", "--data-dir must not be empty"),
        ("data.images mnist --data-dir ''", "--data-dir must not be empty"),
        ("sample --run ''", "--run must not be empty"),
        ("sample --run toy --out ''", "--out must not be empty"),
        ("sample --run toy --weak-run ''", "--weak-run must not be empty"),
        ("sample --run toy --learned-solver ''", "--learned-solver must not be empty"),
        ("learned_solver --run ''", "--run must not be empty"),
        ("digits --batch-size ''", "--batch-size must not be empty"),
    ],
    "a folder that cannot be the run's": [
        *(
            (f"{name} --run-dir {link}", f"{link.split('/')[0]} is a symbolic link to nothing. Give another folder")
            for name, link in [("digits", "dang"), ("toy2d", "loop"), ("cnf", "dang/a/b"), ("reflow", "loop/a")]
        ),
        ("data.images mnist --data-dir dang/a", "dang is a symbolic link to nothing. Give another --data-dir"),
        ("sample --run moons --out dang/a.png", "dang cannot be a folder: dang is a symbolic link to nothing"),
        *(
            (f"{name} --run-dir taken/{taken}", rf"taken/{taken}/{taken} is a folder, and must be a file: move it away")
            for name, names in TAKEN.items()
            for taken in names.split()
        ),
        ("digits --run-dir taken/samples", "taken/samples/samples is a file, and must be a folder: move it away"),
        ("cnf --run-dir taken/checkpoints", "checkpoints is a file, and must be a folder: move it away"),
        ("toy2d --run-dir taken/tensorboard", "tensorboard is a file, and must be a folder: move it away"),
        ("torchcfm_table --run-dir taken/cells", "cells is a file, and must be a folder: move it away"),
        ("cnf --run-dir toy", "toy holds a run of toy2d: give another --run-dir. Nothing was overwritten"),
        ("toy2d --run-dir digits", "digits holds a run of images: give another --run-dir"),
        ("digits --run-dir toy", "toy holds a run of toy2d: give another --run-dir"),
        ("earth --folder places --run-dir toy", "toy holds a run of toy2d: give another --run-dir"),
        ("torus --run-dir toy", "toy holds a run of toy2d: give another --run-dir"),
        ("sudoku --run-dir toy", "toy holds a run of toy2d: give another --run-dir"),
        ("cnf --run-dir table", "table holds a config.json that is of no such run: give another --run-dir"),
        ("digits --run-dir file", "file cannot be a folder: file is a file"),
        ("digits --run-dir file/below/it", "file/below/it cannot be a folder: file is a file"),
        ("toy2d --run-dir file", "file cannot be a folder"),
        ("cnf --run-dir file", "file cannot be a folder"),
        ("reflow --run-dir file", "file cannot be a folder"),
        ("sudoku --run-dir file", "file cannot be a folder"),
        ("torchcfm_table --run-dir file", "file cannot be a folder"),
        ("digits --run-dir /proc/run", "/proc/run cannot be made: "),
        (f"toy2d --run-dir {'a' * 300}", "a cannot be made: File name too long"),
        ("digits --smoke --run-dir theirs", "theirs-smoke, where --smoke would put .*, was not made by a smoke run"),
        ("reflow --smoke --run-dir file", "file-smoke, where --smoke would put its results, is not a folder"),
        *(
            (f"{name} --run-dir busy", r"busy is in use by process PID on \S+, since .* another --run-dir")
            for name in ("digits", "toy2d", "cnf", "reflow", "sudoku", "torchcfm_table")
        ),
        ("toy2d --smoke --run-dir busy", "busy-smoke is in use by process"),
        ("sample --run moons --out file/a.png", "file cannot be a folder: file is a file"),
        ("sample --run moons --out toy.png", "--out toy.png is a folder"),
    ],
    "a folder or file that is not what it should be": [
        ("sample --run nowhere", "--run nowhere is not the folder of a run: there is no such folder"),
        ("sample --run empty", "--run empty is not the folder of a run: it has no config.json"),
        ("sample --run file", "--run file is not the folder of a run: file is a file"),
        ("sample --run dang", "--run dang is not the folder of a run: dang is a symbolic link to nothing"),
        ("sample --run taken/config.json", "is not the folder of a run: its config.json is a folder"),
        ("sample --run moons --weak-run nowhere --guidance 2", "--weak-run nowhere is not the folder of a run"),
        ("learned_solver --run nowhere", "--run nowhere is not the folder of a run"),
        ("sample --run broken/empty", "broken/empty/config.json is damaged, it is not JSON"),
        ("sample --run broken/half", "broken/half/config.json is damaged, it is not JSON"),
        ("learned_solver --run broken/half", "broken/half/config.json is damaged, it is not JSON"),
        ("sample --run broken/bytes", "broken/bytes/config.json is damaged, it is not JSON"),
        ("sample --run broken/list", "broken/list/config.json was not written by one of the experiments"),
        ("sample --run broken/other", "broken/other/config.json was not written by one of the experiments"),
        ("sample --run broken/lacks", r"broken/lacks/config.json cannot be used: config.json lacks \['training'\]"),
        ("sample --run broken/more", r"broken/more/config.json cannot be used: config.json has \['depht'\]"),
        ("sample --run broken/type", "broken/type/config.json cannot be used: --width must be an integer, got 'x'"),
        ("sample --run broken/shape", r"broken/shape/config.json cannot be used: config.json has 3 for Training"),
        ("sample --run toy", "toy holds no checkpoints"),
        ("sample --run play", "play holds no checkpoints"),
        ("learned_solver --run toy", "toy holds no checkpoints"),
        ("torchcfm_table --run-dir broken/half", "broken/half has a damaged config.json"),
        ("torchcfm_table --run-dir toy", "toy holds a run of toy2d: give another --run-dir"),
        ("torchcfm_table --run-dir table", "table holds another table"),
        ("sample --run moons --learned-solver nowhere.npz", "nowhere.npz does not exist: python -m experiments"),
        ("sample --run moons --learned-solver file", "file is not a learned solver, or damaged"),
        ("sample --run moons --learned-solver other.npz", "other.npz is not a learned solver, or damaged"),
        (
            "sample --run moons --weak-run moons/digits --guidance 2",
            "--weak-run moons/digits was trained on other data",
        ),
        ("sample --run moons --weak-run vp --guidance 2", "--weak-run vp was trained by another method than moons"),
        ("sample --run moons --class 3", "--class needs a run with classes"),
        (
            "sample --run toy --out a.jpg",
            "--out must end in .png or .npz, for videos in .gif, or for texts in .txt, got",
        ),
        ("earth", "--folder must say where volerup.csv is. The four files are at https://github.com/"),
        ("earth --folder nowhere", "--folder nowhere has no volerup.csv. The four files are at https://github.com/"),
        ("earth --folder places --data fire", "--folder places has no fire.csv"),
        ("earth --folder places --data flood", r"places/flood.csv must have a latitude and a longitude in each line"),
        ("text --corpus nowhere", "--corpus nowhere does not exist: give a file of text"),
        ("text --corpus empty", "--corpus empty is a folder: give a file of text"),
        ("text --corpus bytes.txt", "--corpus bytes.txt must be a text in UTF-8"),
        ("text --tokenizer nowhere", "--tokenizer nowhere does not exist: give a file of the package tokenizers"),
        ("text --tokenizer file", "--tokenizer file must be a file of the package tokenizers"),
        *(
            (f"torchcfm_table --peer-python {path}", f"must be an .* torch and torchcfm, got \\S*{path}: {why}")
            for path, why in [
                ("nowhere", "No such file or directory"),
                ("file", "Permission denied"),
                ("/bin/true", "it did not do what Python does"),
                ("/bin/ls", ".+"),
                ("bare-python", "ModuleNotFoundError: No module named"),
            ]
        ),
        ("mnist --data-dir empty", "mnist is not prepared in empty"),
        ("cifar10 --data-dir empty", "cifar10 is not prepared in empty"),
        ("data.images mnist --data-dir file", "cannot be a folder: file is a file. Give another --data-dir"),
    ],
}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs that were never trained, broken ones, a file, a folder in use."""
    root = tmp_path_factory.mktemp("world")
    toy = {"experiment": "toy2d"} | config_to_json(toy2d.CONFIG)
    of_digits = {"experiment": "images"} | config_to_json(digits.CONFIG)
    write(root / "toy" / "config.json", toy)
    write(root / "moons" / "config.json", toy | {"source": "moons"})
    write(root / "moons" / "digits" / "config.json", of_digits)
    write(root / "digits" / "config.json", of_digits)
    write(root / "labelled" / "config.json", of_digits | {"label_dropout": 0.0})
    narrow = of_digits["sampling"] | {"guidance_interval": [0.8, 0.9], "guidance_rule": "rescale"}
    write(root / "narrow" / "config.json", of_digits | {"sampling": narrow})
    write(root / "vp" / "config.json", toy | {"method": toy["method"] | {"path": "vp"}})
    write(root / "play" / "config.json", {"experiment": "text"} | config_to_json(text.CONFIG))
    write(root / "play" / "data.json", dataclasses.asdict(facts_of("To be, or not to be", "play", None)))
    write(
        root / "control" / "config.json", {"experiment": "text"} | config_to_json(text.CONFIG) | {"loss": "next_token"}
    )
    write(root / "control" / "data.json", dataclasses.asdict(facts_of("To be, or not to be", "play", None)))
    write(root / "places" / "volerup.csv", b"Latitude,Longitude\n" + b"".join(b"%d,%d\n" % (i, i) for i in range(20)))
    write(root / "places" / "flood.csv", b"lat,long\n1,2\n\xff\xfe\n")
    write(root / "bytes.txt", b"\xff\xfe\x00\x80")
    (root / "empty").mkdir()
    (root / "toy.png").mkdir()
    write(root / "file", b"mine")
    write(root / "file-smoke", b"mine")
    (root / "dang").symlink_to("gone")
    (root / "loop").symlink_to("loop")
    for name in {name for names in TAKEN.values() for name in names.split()}:
        write(root / "taken" / name / name / "thesis.tex", b"mine")
    for name in ("samples", "checkpoints", "tensorboard", "cells"):
        write(root / "taken" / name / name, b"mine")
    write(root / "table" / "config.json", {"seeds": [1]})
    write(root / "bare-python", f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n'.encode())
    (root / "bare-python").chmod(0o755)
    write(root / "theirs-smoke" / "thesis.tex", b"mine")
    np.savez(root / "other.npz", samples=np.zeros(3))
    whole = json.dumps(toy).encode()
    for name, content in {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "bytes": b"\xff\xfe\x00\x80" * 9,
        "list": [1, 2],
        "other": {"experiment": "mine"},
        "lacks": {name: value for name, value in toy.items() if name != "training"},
        "more": toy | {"depht": 3},
        "type": toy | {"width": "x"},
        "shape": toy | {"training": 3},
    }.items():
        write(root / "broken" / name / "config.json", content)
    with lock_folder(root / "busy"), lock_folder(root / "busy-smoke"):
        yield root


def snapshot(root: Path):
    return sorted((str(path), path.is_file() and path.read_bytes()) for path in root.rglob("*"))


def unboxed(text: str) -> str:
    """What tyro's box says, as one line."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a command line that must be refused before any work, and returns what it says."""
    monkeypatch.delenv("FM_JAX_TRACEBACK", raising=False)
    for module, name in WORK:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("went to work"))
    monkeypatch.setattr(sample, "restore_run", _restored_without_a_checkpoint)

    def run(command: str) -> str:
        name, *options = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [name, *options])
        with pytest.raises(SystemExit) as caught:
            MAINS[name]()
        assert caught.value.code not in (0, None)
        out, err = capsys.readouterr()
        message = caught.value.code if isinstance(caught.value.code, str) else ""
        assert "Traceback" not in out + err + message
        return unboxed(f"{err} {message}")

    return run


_restore_run = sample.restore_run


def _restored_without_a_checkpoint(run_dir, option="--run"):
    """The run `moons` and others count as trained: what comes after they are restored can be wrong too."""
    if str(run_dir) not in ("moons", "moons/digits", "vp"):
        return _restore_run(run_dir, option)
    config, experiment = sample.read_run(run_dir, option)
    return Restored(config, experiment, 0, None)


@pytest.mark.parametrize(
    ("command", "message"), [case for cases in CASES.values() for case in cases], ids=lambda x: str(x)[:60]
)
def test_is_refused(command, message, world, refusal, monkeypatch):
    monkeypatch.chdir(world)
    before = snapshot(world)
    found = refusal(command)
    assert re.search(message.replace("PID", str(os.getpid())), found), found
    assert snapshot(world) == before


def test_there_are_enough():
    counts = {kind: len(cases) for kind, cases in CASES.items()}
    print("\nwrong command lines by kind:")
    for kind, count in [*counts.items(), ("all", sum(counts.values()))]:
        print(f"{count:5}  {kind}")
    repeated = [c for c, n in collections.Counter(c for cases in CASES.values() for c, _ in cases).items() if n > 1]
    assert not repeated
    assert sum(counts.values()) >= 120


def test_the_default_of_an_option_without_effect_is_no_mistake(world, monkeypatch):
    """What the configuration has anyway may be said: --tolerance 1e-2 is the digits' own."""
    monkeypatch.chdir(world)
    reached = []
    monkeypatch.setattr(images, "run", reached.append)
    monkeypatch.setattr(sys, "argv", ["digits", "--solver", "heun", "--tolerance", "1e-2", "--eta", "0"])
    MAINS["digits"]()
    assert len(reached) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first\nsecond"), "ValueError: first second (FM_JAX_TRACEBACK=1 shows where.)"),
        (
            OSError(28, "No space left on device", "runs/a"),
            "device (runs/a). There is no good step: once this",
        ),
        (PermissionError(13, "Permission denied", "runs/a"), "Permission denied (runs/a)."),
        (ImportError("x needs ott-jax: pip install 'fm_jax[ot]'."), "x needs ott-jax"),
        (CheckpointError("It is damaged."), "It is damaged."),
        (NonFiniteLossError("Not finite at step 3."), "Not finite at step 3."),
        (RuntimeError("INTERNAL: what"), "RuntimeError: INTERNAL: what (FM_JAX"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "Not enough memory: lower what makes the arrays large"),
        (MemoryError("Unable to allocate 9 TiB"), "as --batch-size. (Unable to allocate 9 TiB)"),
        (
            RuntimeError("x\nThe maximum number of solver steps was reached."),
            "raise --tolerance, or take a --solver with",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_mistakes_found_while_running(error, message, world, monkeypatch):
    def fails(config):
        raise error

    monkeypatch.chdir(world)
    monkeypatch.setattr(cnf, "run", fails)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.raises(SystemExit) as caught:
        cnf.main()
    assert message in caught.value.code
    monkeypatch.setenv("FM_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cnf.main()


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["tsit5", "kvaerno3"])
def test_a_solver_that_does_not_arrive(solver, world, monkeypatch, capfd, caplog):
    """From within a jitted function, without the pages that JAX and Equinox have about it."""
    sampler = Adaptive(solver, 1e-7, 1e-7, per_sample=solver == "kvaerno3", max_steps=3)
    v = lambda t, x: 30 * jnp.sin(50 * x)  # noqa: E731
    monkeypatch.chdir(world)
    monkeypatch.setattr(cnf, "run", lambda config: jax.jit(lambda x: fm_sample(v, x, sampler).x)(jnp.ones((3, 2))) + 1)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.raises(SystemExit, match="came to the end of its steps before that of the path: raise --tolerance"):
        cnf.main()
    assert capfd.readouterr().err == ""
    assert caplog.records == []


def test_an_error_in_the_code_is_no_mistake_of_the_user(monkeypatch):
    monkeypatch.setattr(cnf, "run", lambda config: config.training.steps)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.raises(AttributeError):
        cnf.main()


def test_ctrl_c_outside_of_the_loop(monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cnf, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.raises(SystemExit) as caught:
        cnf.main()
    assert caught.value.code == 130


def test_without_the_extra(monkeypatch):
    """`python -m experiments.digits` says so before it imports what is not there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    importlib.reload(experiments)
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit, match=r"experiments need tyro, .*: pip install 'fm_jax\[experiments\]'"):
        importlib.reload(experiments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("experiments.digits --batch-size 0", "--batch-size must be from 1 to 1000000, got 0"),
        ("experiments.torchcfm_table --methods OFM --steps 100", "--steps 100 would have no effect"),
        ("experiments.toy2d --run-dir file", "file cannot be a folder: file is a file"),
        ("experiments.sample --run broken/half", "is damaged, it is not JSON"),
        ("fm_jax.data.images mnist --data-dir file", "cannot be a folder: file is a file"),
        ("experiments.mnist --data-dir nowhere", "mnist is not prepared in nowhere"),
    ],
)
def test_as_a_process(command, message, world):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=world, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert message in unboxed(done.stderr)


CONFIGS = {
    "images": (images.Config, own_images.CONFIG),
    "toy2d": (toy2d.Config, toy2d.CONFIG),
    "text_to_image": (text_to_image.Config, text_to_image.CONFIG),
    "text_to_video": (text_to_video.Config, text_to_video.CONFIG),
    "autoencoder": (autoencoder.Config, autoencoder.CONFIG),
    "earth": (earth.Config, earth.CONFIG),
    "encode": (encode.Config, None),
    "latent": (latent.Config, latent.CONFIG),
    "cnf": (cnf.Config, cnf.CONFIG),
    "reflow": (reflow.Config, reflow.Config()),
    "sudoku": (sudoku.Config, sudoku.CONFIG),
    "text": (text.Config, text.CONFIG),
    "token_images": (token_images.Config, token_images.CONFIG),
    "torus": (torus.Config, torus.CONFIG),
    "torchcfm_table": (table.Config, table.CONFIG),
    "learned_solver": (learned_solver.Config, None),
    "sample": (sample.Config, None),
    "export": (export.Config, None),
}


def paths_of(kind, within=()):
    """The fields that are paths, by the names on the way to them."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from paths_of(hint, (*within, name))
        elif Path in (hint, *typing.get_args(hint)):
            yield (*within, name)


REFUSED = [(name, ("data", "encoded")) for name in ("autoencoder", "encode", "token_images")]
PATHS = [(name, path) for name, (kind, _) in CONFIGS.items() for path in paths_of(kind) if (name, path) not in REFUSED]
TOGETHER = {
    ("sample", "image"): ["--strength=0.5"],
    ("sample", "mask"): ["--image=a.png"],
    ("encode", "text"): ["--captions=a.txt"],
    ("encode", "captions"): ["--text=t5"],
}
"""What has to be given with a path."""


def read(monkeypatch, command, path, typed):
    """What a command makes of an option that is a path."""
    needs_run = command in ("sample", "learned_solver", "export") and path != ("run",)
    argv = [
        f"{option(path[-1])}={typed}",
        *(["--run=toy"] if needs_run else []),
        *TOGETHER.get((command, path[-1]), []),
    ]
    monkeypatch.setattr(sys, "argv", [command, *argv])
    kind, default = CONFIGS[command]
    return functools.reduce(getattr, path, command_line.parse(kind, default))


def test_all_options_that_are_paths_are_known():
    assert {path[-1] for _, path in PATHS} >= {"run_dir", "out", "run", "weak_run", "learned_solver", "peer_python"}
    assert ("toy2d", ("training", "run_dir")) in PATHS


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("command", "path"), PATHS, ids=lambda x: str(x))
def test_a_path_as_shells_and_job_systems_pass_it(command, path, world, monkeypatch):
    ending = ".safetensors" if command == "export" else ".npz"
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.setenv("SCRATCH", str(world))
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.setenv("VOID", "")
    for typed, meant in {
        "~/a.npz": f"{world}/a.npz",
        "$SCRATCH/a.npz": f"{world}/a.npz",
        "${SCRATCH}/a.npz/": f"{world}/a.npz",
        "file:///b/a%20c.npz": "/b/a c.npz",
        "file://localhost/b/a.npz": "/b/a.npz",
        "'b/a c.npz'": "b/a c.npz",
        '"/b/a.npz"': "/b/a.npz",
        " a.npz\r": "a.npz",
        "a.npz\n": "a.npz",
        "b$/a$1.npz": "b$/a$1.npz",
        "../a.npz": "../a.npz",
    }.items():
        ended = [each.replace(".npz", ending) for each in (typed, meant)]
        assert read(monkeypatch, command, path, ended[0]) == Path(ended[1]), typed
    name = re.escape(option(path[-1]))
    for typed, message in {
        "$GONE/a.npz": "must be a path, got .*, and the environment variable GONE is not set",
        "${VOID}/a.npz": "must be a path, got .*, and the environment variable VOID is empty",
        "~nobody_at_all/a.npz": "there is not a user nobody_at_all, whose home that would be. A name that begins so is",
        "gs://bucket/a.npz": "must be a path on this machine, got gs://bucket/a.npz: mount what gs:// stands for",
        "file://host/a.npz": "must be a path on this machine, such as file:///runs/a or /runs/a",
        "file:a.npz": "must be a path on this machine, such as file:///runs/a or /runs/a",
        '"a.npz': "must have both of its quotation marks or none",
        "''": "must not be empty",
        "a\nb.npz": "must be a path without line breaks and other control characters",
        "a\0b.npz": "must be a path without line breaks and other control characters",
        "$(pwd)/a.npz": "must be a path, got a command that no shell has replaced",
    }.items():
        with pytest.raises(SystemExit, match=f"^{name} .*{message}"):
            read(monkeypatch, command, path, typed)


def test_what_is_there_under_the_very_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~a", "$GONE", "a ", '"a"', "file:a", "gs:", "$(a)"):
        Path(name).mkdir()
        assert options.path_of(name) == Path(name)


def test_without_a_home(monkeypatch, tmp_path, capfd):
    """No HOME, and no entry in the list of users: everything but "~" goes."""

    def nobody(*_):
        raise KeyError("uid not found")

    before = jax.config.values["jax_compilation_cache_dir"]
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(sys, "argv", ["toy2d"])
    assert command_line.parse(toy2d.Config, toy2d.CONFIG) == toy2d.CONFIG
    monkeypatch.setattr(sys, "argv", ["toy2d", "--run-dir=~/a"])
    with pytest.raises(SystemExit, match="--run-dir must be a path, got ~/a, and there is not a home directory"):
        command_line.parse(toy2d.Config, toy2d.CONFIG)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["toy2d"])
    command_line.parse(toy2d.Config, toy2d.CONFIG)
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def warned(config):
        for what in ("reading", "writing", "writing"):
            told = f"Error {what} persistent compilation cache entry for 'jit_f': OSError: [Errno 28] No space"
            warnings.warn(told, stacklevel=1)
        warnings.warn("mine", stacklevel=1)

    monkeypatch.setattr(cnf, "run", warned)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.warns(UserWarning, match="mine"):
        cnf.main()
    err = capsys.readouterr().err
    assert re.match(r"The compilation cache \S* cannot be used \(OSError: \[Errno 28\] No space\): what it lacks", err)
    assert len(err.splitlines()) == 1


OUTPUT = """
import sys, types
from experiments import cnf
cnf.run = lambda config: {run}
cnf.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "shell", "env", "status", "out", "err"),
    [
        ("print('± ä')", "{}", {"PYTHONIOENCODING": "ascii"}, 0, "\\xb1 \\xe4\n", ""),
        ("print('€')", "{}", {"PYTHONIOENCODING": "latin-1"}, 0, "\\u20ac\n", ""),
        ("print('±')", "{} >&- 2>&- <&-", {}, 0, "", ""),
        ("print('±')", "{} | true", {}, 141, "", ""),
        ("[print(i, flush=True) for i in range(9**6)]", "{} | head -1", {}, 141, "0\n", ""),
        ("print('±')", "{} --help | true", {"PYTHONUNBUFFERED": "1"}, 141, "", ""),
        ("print('±')", "{} > /dev/full", {}, 1, "", "No space left on device (standard output)."),
        ("print('±', flush=True)", "{} > /dev/full", {}, 1, "", "No space left on device (standard output)."),
    ],
)
def test_output_that_is_not_taken(run, shell, env, status, out, err, tmp_path):
    (tmp_path / "script.py").write_text(OUTPUT.format(run=run))
    command = "set -o pipefail; " + shell.format(f"{shlex.quote(sys.executable)} script.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", **env}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == status
    assert done.stdout.decode("latin-1") == out
    assert done.stderr.decode().startswith(err)
    assert len(done.stderr.splitlines()) == bool(err)


@pytest.mark.parametrize("number", OF_DISK, ids=lambda number: errno.errorcode[number])
def test_a_disk_that_takes_no_more_names_the_place_and_the_last_good_step(number, monkeypatch, tmp_path):
    def fails(config):
        raise OSError(number, os.strerror(number), str(tmp_path / "run-smoke" / "metrics.jsonl"))

    monkeypatch.setattr(cnf, "run", fails)
    monkeypatch.setattr(sys, "argv", ["cnf", "--run-dir", str(tmp_path / "run")])
    where = re.escape(f"{os.strerror(number)} ({tmp_path / 'run-smoke' / 'metrics.jsonl'}). ")
    with pytest.raises(
        SystemExit, match=f"^{where}There is no good step: once this is mended, the same command begins"
    ):
        cnf.main()
    for step in ("200", "1600", "1800.orbax-checkpoint-tmp"):
        write(tmp_path / "run-smoke" / "checkpoints" / step / "meta" / "metadata", {})
    with pytest.raises(SystemExit, match=f"^{where}The last good step is 1,600: once this is mended, the same command"):
        cnf.main()


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("reflow --run-dir a/b", "a/b"),
        ("reflow --run-dir a/b --smoke", "a/b-smoke"),
        ("toy2d --run-dir a/b --smoke", "a/b-smoke"),
        ("torchcfm_table --run-dir a/b", "a/b"),
        ("learned_solver --run toy", "toy"),
        ("sample --run toy --out a/b.npz", "a/b.npz"),
    ],
)
def test_a_full_disk_without_a_name_is_that_of_the_run(command, place, world, monkeypatch):
    def fails(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    name, *rest = shlex.split(command)
    monkeypatch.chdir(world)
    monkeypatch.setattr({"torchcfm_table": table}.get(name) or sys.modules[f"experiments.{name}"], "run", fails)
    monkeypatch.setattr(sys, "argv", [name, *rest])
    with pytest.raises(SystemExit, match=rf"^No space left on device \({place}\)\. "):
        MAINS[name]()


def test_a_network_that_is_not_finite_is_not_blamed_on_the_tolerance(world, monkeypatch, capfd):
    told = "The velocity is not finite at t = 0.3: the network has diverged."

    def fails(config):
        with contextlib.suppress(ValueError):
            jax.jit(lambda x: eqx.error_if(x, jnp.isnan(x).any(), told))(jnp.float32(jnp.nan)).block_until_ready()

    monkeypatch.chdir(world)
    monkeypatch.setattr(cnf, "run", fails)
    monkeypatch.setattr(sys, "argv", ["cnf"])
    with pytest.raises(SystemExit) as caught:
        cnf.main()
    assert caught.value.code == told
    assert capfd.readouterr().err == ""


def test_a_run_that_diverged_is_told_how_to_go_on(monkeypatch):
    def fails(config):
        raise NonFiniteLossError("Not finite at step 3. The last good checkpoint is 2. Begin a new run from it.")

    monkeypatch.setattr(cnf, "run", fails)
    monkeypatch.setattr(sys, "argv", ["cnf", "--run-dir", "mine"])
    with pytest.raises(SystemExit, match="--init-from mine, another --run-dir and a lower --learning-rate"):
        cnf.main()
