"""Stable Diffusion 3's transformer against diffusers' SD3Transformer2DModel."""

import functools
import re
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import (
    Case,
    check_mutation,
    check_peer,
    check_record,
    distances,
    first_difference,
    first_last,
    random_input,
    to_torch,
)

import fm_jax.weights.mmdit as weights
from fm_jax.models import mmdit
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import Conditions
from fm_jax.weights.mmdit import mmdit_config, mmdit_rules
from fm_jax.weights.rules import dense

TIMES = np.array([0.8, 0.15], np.float32)
SMALL = {
    "channels": 4,
    "hidden": 32,
    "num_heads": 2,
    "num_layers": 3,
    "token_dim": 12,
    "vector_dim": 10,
    "table_size": 9,
    "table_base": 4,
}
SD35 = SMALL | {"num_layers": 5, "num_dual": 2, "qk_norm": True}


def build(**options):
    # The class is looked up when it is built, so that a mutation can stand in for it.
    return mmdit.MMDiT(**(SMALL | options))


@functools.cache
def rules_of(module, layout, _swapped_halves):
    return weights.mmdit_rules(module, layout)


def inputs(options, mask=None):
    sizes = SMALL | options
    arrays = {
        "t": TIMES,
        "x": random_input("mmdit x", (2, 8, 6, sizes["channels"])),
        "vector": random_input("mmdit vector", (2, sizes["vector_dim"])),
        "tokens": random_input("mmdit tokens", (2, 7, sizes["token_dim"])),
    }
    return arrays if mask is None else arrays | {"mask": np.array(mask)}


def ours(options, params, arrays):
    cond = Conditions(vector=arrays["vector"], tokens=arrays["tokens"], mask=arrays.get("mask"))
    return {"u": build(**options).apply({"params": params}, arrays["t"], arrays["x"], cond)}


def trace_ours(options, params, arrays):
    """What each block makes of the image."""
    cond = Conditions(vector=arrays["vector"], tokens=arrays["tokens"], mask=arrays.get("mask"))
    _, state = build(**options).apply(
        {"params": params},
        arrays["t"],
        arrays["x"],
        cond,
        capture_intermediates=lambda module, _: isinstance(module, mmdit.JointBlock),
        mutable=["intermediates"],
    )
    blocks, out = state["intermediates"], []
    for name, _, length in build(**options).runs:
        stacked = f"{name}s" in blocks
        single = [] if stacked else [blocks[f"{name}_{i}"]["__call__"][0][0] for i in range(length)]
        out += list(blocks[f"{name}s"]["__call__"][0][0]) if stacked else single
    if "last_block" in blocks:
        out.append(blocks["last_block"]["__call__"][0][0])
    return {f"block {i}": h for i, h in enumerate(out)}


def torch_model(options, tensors):
    import torch
    from diffusers import SD3Transformer2DModel

    config = {key: value for key, value in mmdit_config(build(**options)).items() if not key.startswith("_")}
    model = SD3Transformer2DModel(**config).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model.to(torch.float32)


def torch_call(model, arrays, skip_layers=None, dtype=None):
    """-u of every row; a row with padding alone, without its padding, since theirs knows no mask."""
    import torch

    dtype = torch.float32 if dtype is None else dtype
    x, vector, tokens = (torch.from_numpy(arrays[name]).to(dtype) for name in ("x", "vector", "tokens"))
    time, x = 1000 * (1 - torch.from_numpy(arrays["t"])), x.permute(0, 3, 1, 2)
    mask = arrays.get("mask", np.ones(tokens.shape[:2], bool))
    lengths = mask.sum(axis=1)
    rows = [slice(None)] if mask.all() else [slice(i, i + 1) for i in range(len(lengths))]
    with torch.no_grad():
        out = [
            model(
                x[row],
                encoder_hidden_states=tokens[row, : lengths[row].max()],
                pooled_projections=vector[row],
                timestep=time[row],
                skip_layers=skip_layers,
            ).sample
            for row in rows
        ]
    return {"u": -first_last(torch.cat(out).to(torch.float32))}


def theirs(options, tensors, arrays):
    return torch_call(torch_model(options, tensors), arrays, options.get("skip_layers"))


def trace_theirs(options, tensors, arrays):
    model, found = torch_model(options, tensors), {}
    for i, block in enumerate(model.transformer_blocks):
        rows = found.setdefault(f"transformer_blocks.{i}", [])
        block.register_forward_hook(lambda _, __, out, rows=rows: rows.append(out[1].numpy()))
    torch_call(model, arrays, options.get("skip_layers"))
    return {name: np.concatenate(rows) for name, rows in found.items() if rows}


def case(name, mask=None, layout="diffusers", **options):
    run = [i for i in range((SMALL | options)["num_layers"]) if i not in options.get("skip_layers", ())]
    return Case(
        name=f"mmdit_{name}",
        rules=lambda: rules_of(build(**options), layout, weights.swapped_halves),
        inputs=lambda: inputs(options, mask),
        ours=lambda params, arrays: ours(options, params, arrays),
        theirs=lambda tensors, arrays: theirs(options, tensors, arrays),
        blocks=tuple((f"block {i}", f"transformer_blocks.{i}") for i in run),
        trace_ours=lambda params, arrays: trace_ours(options, params, arrays),
        trace_theirs=lambda tensors, arrays: trace_theirs(options, tensors, arrays),
    )


PLAIN = case("sd3")
DUAL = case("sd35_medium", **SD35)
CASES = [
    PLAIN,
    DUAL,
    case("sd35_large", qk_norm=True, num_layers=4, patch_size=1, out_channels=3),
    case("skip_layers", **SD35, skip_layers=(0, 3, 4)),
    case("all_dual", **SD35 | {"num_layers": 2}, scan_layers=False),
    case("mask", num_dual=1, qk_norm=True, mask=[[True] * 7, [True] * 4 + [False] * 3]),
]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_it_gives_what_pytorch_gave(case):
    check_record(case)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_it_gives_what_pytorch_gives(case):
    check_peer(case)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_block_gives_what_pytorchs_gives(case):
    pytest.importorskip("torch")
    assert first_difference(case).startswith("all blocks agree")


# Mistakes: text of our source, and what it is replaced by.
MISTAKES = {
    "crop at the corner": (PLAIN, "features[(size - length) // 2 :][:length]", "features[:length]"),
    "attn2 after the first residual": (
        DUAL,
        "alone(modulate(normed, shift, scale))",
        'alone(modulate(layer_norm(dtype, "norm_self")(new), shift, scale))',
    ),
    "patches (c, p, q)": (
        PLAIN,
        "(patchify(x, self.patch_size))",
        "(patchify(x, self.patch_size).reshape(x.shape[0], -1, 4, 4).swapaxes(2, 3).reshape(x.shape[0], -1, 16))",
    ),
    "erf for tanh": (PLAIN, "approximate=True", "approximate=False"),
}
MORE_MISTAKES = {
    "gates of the streams": (PLAIN, "gate_ca * context_a", "gate_a * context_a"),
    "time not reversed": (PLAIN, "RECTIFIED.time(batch_time(t, x))", "1000.0 * batch_time(t, x)"),
    "epsilon of the norm of keys": (DUAL, 'key")(k)', 'key", epsilon=1e-3)(k)'),
    "another order of the second branch": (DUAL, "shift, scale, gate = second", "gate, shift, scale = second"),
}


def mutated(old, new):
    """The module with a mistake."""
    source = Path(mmdit.__file__).read_text()
    assert old in source, f"the source no longer has {old!r}"
    module = ModuleType("fm_jax.models.mmdit_with_a_mistake")
    exec(compile(re.sub(r"\A\"\"\".*?\"\"\"", "", source.replace(old, new)), "mistake", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "mistake", [*MISTAKES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MISTAKES)]
)
@pytest.mark.slow
def test_a_mistake_shows(mistake, monkeypatch):
    case, old, new = (MISTAKES | MORE_MISTAKES)[mistake]
    network = mutated(old, new).MMDiT
    monkeypatch.setattr(mmdit, "MMDiT", network)
    monkeypatch.setattr(weights, "MMDiT", network)
    check_mutation(case)


def test_another_epsilon_of_the_layer_norms_shows(monkeypatch):
    layer_norm = mmdit.layer_norm
    monkeypatch.setattr(mmdit, "layer_norm", lambda dtype, name: layer_norm(dtype, name, epsilon=1e-5))
    check_mutation(PLAIN)


@pytest.mark.parametrize("key", ["norm_out.linear", "transformer_blocks.2.norm1_context.linear"])
@pytest.mark.slow
def test_halves_in_stabilitys_order_show(key, monkeypatch):
    swapped = weights.swapped_halves

    def halves(path, name, width):
        return dense(path, name) if name == key else swapped(path, name, width)

    monkeypatch.setattr(weights, "swapped_halves", halves)
    check_mutation(PLAIN)


def stability_of_diffusers(tensors, num_layers, num_dual):
    """A state in Stability's layout from one in diffusers', written down once more, without the rules."""
    state = {"pos_embed": tensors["pos_embed.pos_embed"]}

    def move(new, old, change=lambda x: x):
        for end in ("weight", "bias"):
            if f"{old[0]}.{end}" in tensors:
                state[f"{new}.{end}"] = change(np.concatenate([tensors[f"{name}.{end}"] for name in old]))

    def halves(x):
        return np.concatenate(np.split(x, 2)[::-1])

    move("x_embedder.proj", ["pos_embed.proj"])
    move("context_embedder", ["context_embedder"])
    for new, old in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        move(f"{new}.mlp.0", [f"time_text_embed.{old}.linear_1"])
        move(f"{new}.mlp.2", [f"time_text_embed.{old}.linear_2"])
    move("final_layer.linear", ["proj_out"])
    move("final_layer.adaLN_modulation.1", ["norm_out.linear"], halves)
    for i in range(num_layers):
        last, old = i == num_layers - 1, f"transformer_blocks.{i}"
        for stream, end, q, added, out, feed in (
            ("x_block", "", "to_{}", "", "to_out.0", "ff"),
            ("context_block", "_context", "add_{}_proj", "_added", "to_add_out", "ff_context"),
        ):
            new = f"joint_blocks.{i}.{stream}"
            swap = halves if last and end else (lambda x: x)
            move(f"{new}.adaLN_modulation.1", [f"{old}.norm1{end}.linear"], swap)
            move(f"{new}.attn.qkv", [f"{old}.attn.{q.format(name)}" for name in "qkv"])
            move(f"{new}.attn.proj", [f"{old}.attn.{out}"])
            move(f"{new}.attn.ln_q", [f"{old}.attn.norm{added}_q"])
            move(f"{new}.attn.ln_k", [f"{old}.attn.norm{added}_k"])
            move(f"{new}.mlp.fc1", [f"{old}.{feed}.net.0.proj"])
            move(f"{new}.mlp.fc2", [f"{old}.{feed}.net.2"])
        if i < num_dual:
            move(f"joint_blocks.{i}.x_block.attn2.qkv", [f"{old}.attn2.to_{name}" for name in "qkv"])
            move(f"joint_blocks.{i}.x_block.attn2.proj", [f"{old}.attn2.to_out.0"])
            move(f"joint_blocks.{i}.x_block.attn2.ln_q", [f"{old}.attn2.norm_q"])
            move(f"joint_blocks.{i}.x_block.attn2.ln_k", [f"{old}.attn2.norm_k"])
    return state


@pytest.mark.parametrize("options", [{}, SD35], ids=["sd3", "sd35"])
def test_stabilitys_layout_is_diffusers_in_other_words(options):
    module = build(**options)
    rules = mmdit_rules(module)
    tensors = case("x", **options).tensors()
    params = rules.to_ours(tensors)
    other = mmdit_rules(module, "stability")
    written = other.to_theirs(params) | {key: table() for key, table in other.tables.items()}
    expected = stability_of_diffusers(tensors, module.num_layers, module.num_dual)
    assert written.keys() == expected.keys()
    assert len(written) == len(tensors) - 4 * (2 * module.num_layers + module.num_dual)  # q, k, v are one
    for key, value in expected.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    back = rules.to_theirs(other.to_ours(written))
    for key, value in back.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, SD35], ids=["sd3", "sd35"])
def test_diffusers_reads_what_stabilitys_layout_writes(options):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_sd3_transformer_checkpoint_to_diffusers
    module = build(**options)
    tensors = case("x", **options).tensors()
    rules = mmdit_rules(module, "stability")
    written = rules.to_theirs(mmdit_rules(module).to_ours(tensors)) | {key: f() for key, f in rules.tables.items()}
    read = convert({f"model.diffusion_model.{key}": value for key, value in to_torch(written).items()})
    assert read.keys() == tensors.keys()
    for key, value in read.items():
        np.testing.assert_array_equal(value.numpy(), tensors[key], err_msg=key)


@pytest.mark.parity
def test_the_positions_are_pytorchs():
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    for size, base, dim in ((9, 4, 32), (192, 64, 16), (384, 64, 16)):
        found = mmdit.position_table(size, size, size, base, dim)
        expected = embeddings.get_2d_sincos_pos_embed(dim, size, base_size=base).to(torch.float32).numpy()
        assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES[:2], ids=repr)
def test_bfloat16_is_pytorchs(case):
    torch = pytest.importorskip("torch")
    options = {} if case is PLAIN else SD35
    model = torch_model(options, case.tensors()).to(torch.bfloat16)
    theirs = torch_call(model, case.inputs(), dtype=torch.bfloat16)
    options = options | {"compute": Compute("bfloat16")}
    found = ours(
        options,
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.rules().to_ours(case.tensors())),
        case.inputs(),
    )
    found = {name: np.asarray(value, np.float32) for name, value in found.items()}
    assert max(distances(found, theirs).values()) < 2e-2
    assert max(distances(found, case.recorded()).values()) < 2e-2
