"""The continuum as a block of ours, as the sum it stands for, and inside another Megatron program."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from nlscale.bench.plain import Layer, Plain
from nlscale.config.levels import Levels
from nlscale.config.parallel import Parallel
from nlscale.config.run import Run
from nlscale.model.continuum import continuum_spec
from nlscale.model.count import flops_a_token, parameters
from nlscale.model.hope import Hope
from nlscale.model.init import TABLE, draw, initialize
from nlscale.model.layers import transformer_config
from nlscale.model.scene import scene
from nlscale.parallel.apply import parallelize, stages
from nlscale.runtime.leaf import prefixed
from nlscale.runtime.world import World, join
from nlscale.testing import ranks
from tests.tiny import micro_batches, tiny


def whole(*overrides: str) -> tuple[Hope, dict[str, Tensor], World]:
    run = tiny(*overrides)
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    return model.chunks[0], {leaf.name: leaf.value for leaf in model.leaves}, world


def by_levels(variant: str, activation: str) -> float:
    """Largest difference between a block and its levels written out one by one."""
    model, value, _ = whole(f"model.variant={variant}", f"model.activation={activation}")
    x = torch.randn(16, 2, 32, dtype=torch.float64)
    y = x
    for level in ("fast", "slow", "long"):
        prefix = f"blocks.1.continuum.{level}"
        gain = value["blocks.1.continuum.norm.weight" if variant == "independent" else f"{prefix}.norm.weight"]
        read = x if variant == "independent" else y
        normed = read / (read.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        up = normed @ value[f"{prefix}.up.weight"].t()
        hidden = (
            F.silu(normed @ value[f"{prefix}.gate.weight"].t()) * up
            if activation == "swiglu"
            else F.gelu(up, approximate="tanh")
        )
        y = y + hidden @ value[f"{prefix}.down.weight"]
    return float((model.blocks[1].continuum(x) - y).abs().max())


@pytest.mark.parametrize("variant", ["independent", "sequential"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_i8_a_block_is_the_sum_of_its_levels(variant: str, activation: str) -> None:
    assert ranks(1, by_levels, variant, activation)[0] < 1e-12


def deeper(run: Run, values: dict[str, Tensor]) -> Plain:
    """Torch's Transformer with an MLP for each level after another: a layer whose attention gives nothing is its MLP."""
    units = {level.name: size for level, size in zip(run.levels, (32, 16, 16), strict=True)}
    plain = Plain(run.model, 16).double()
    plain.layers = nn.ModuleList(
        Layer(replace(run.model, hidden=size)) for _ in range(run.model.layers) for size in units.values()
    ).double()
    each = iter(plain.layers)
    with torch.no_grad():
        for place in range(run.model.layers):
            mix = {name: values[f"blocks.{place}.mix.{name}.weight"] for name in ("norm", "q", "k", "v", "out")}
            for turn, level in enumerate(units):
                layer = next(each)
                own = {
                    n: values[f"blocks.{place}.continuum.{level}.{n}.weight"] for n in ("norm", "gate", "up", "down")
                }
                layer.norm1.weight.copy_(mix["norm"])
                layer.qkv.weight.copy_(torch.cat([mix["q"], mix["k"], mix["v"]]))
                layer.out.weight.copy_(mix["out"] * (turn == 0))
                layer.norm2.weight.copy_(own["norm"])
                layer.up.weight.copy_(torch.cat([own["gate"], own["up"]]))
                layer.down.weight.copy_(own["down"].T)
        plain.embed.weight.copy_(values["embed.weight"])
        plain.norm.weight.copy_(values["norm.weight"])
        plain.head.weight.copy_(values["head.weight"])
    for module in plain.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = run.model.norm_eps
    return plain


def chain_and_deeper() -> list[tuple[Tensor, Tensor]]:
    """Loss, and gradients of embedding and head, of a chain of levels and of torch's Transformer."""
    said = "model.variant=sequential", "model.attention=causal"
    model, values, _ = whole(*said)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(("norm" in name) + 0.3 * torch.randn_like(value))
    tokens, targets = torch.randint(0, 128, (2, 2, 16))
    loss = model(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool)) / tokens.numel()
    plain = deeper(tiny(*said), values)
    other = plain(tokens, targets)
    ours = torch.autograd.grad(loss, [model.embed.weight, model.head.weight])
    theirs = torch.autograd.grad(other, [plain.embed.weight, plain.head.weight])
    return [(loss.detach(), other.detach()), *zip(ours, theirs, strict=True)]


def test_row_23_a_chain_of_levels_is_a_transformer_with_a_deeper_mlp() -> None:
    for ours, theirs in ranks(1, chain_and_deeper)[0]:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def parted() -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a level, of its parts as levels, and of these when one has moved."""
    levels = "levels=[{name: all, period: 1, width: 1.0}]"
    model, one, world = whole(levels)
    there = parallelize(tiny(), world, torch.float64)
    other, three = there.chunks[0], {leaf.name: leaf.value for leaf in there.leaves}
    with torch.no_grad():
        for name, value in three.items():
            level = name.split(".")[3] if ".continuum." in name and ".norm." not in name else ""
            if not level:
                value.copy_(one[name])
                continue
            first, last = {"fast": (0, 32), "slow": (32, 48), "long": (48, 64)}[level]
            value.copy_(one[name.replace(f".{level}.", ".all.")][first:last])
        (batch,) = micro_batches(tiny("train.global_batch=2"), 0, 0, 1)
        found = [model(*batch), other(*batch)]
        three["blocks.0.continuum.slow.down.weight"].mul_(1.1)
        return found[0], found[1], other(*batch)


def test_row_31_a_level_parted_into_levels_is_the_same_function_bit_for_bit() -> None:
    one, three, moved = ranks(1, parted)[0]
    assert torch.equal(one, three) and not torch.equal(one, moved)


def joined() -> tuple[Tensor, Tensor, Tensor]:
    """Losses without a level, with a new one whose output projection is zero, and with one whose is not."""
    model, before, world = whole()
    wider = "levels=[{name: fast, period: 1, width: 0.4}, {name: slow, period: 4, width: 0.2}, "
    wider += "{name: long, period: 16, width: 0.2}, {name: new, period: 16, width: 0.2}]"
    there = parallelize(tiny(wider, "model.hidden=80"), world, torch.float64)
    with torch.no_grad():
        for leaf in there.leaves:
            if leaf.name in before:
                leaf.value.copy_(before[leaf.name])
            elif leaf.name.endswith(".down.weight"):
                leaf.value.zero_()
        (batch,) = micro_batches(tiny("train.global_batch=2"), 0, 0, 1)
        found = [model(*batch), there.chunks[0](*batch)]
        new = {leaf.name: leaf.value for leaf in there.leaves}["blocks.0.continuum.new.down.weight"]
        new.fill_(0.1)
        return found[0], found[1], there.chunks[0](*batch)


def test_row_31_a_new_level_that_says_nothing_changes_no_bit() -> None:
    """But for the last one of float64: BLAS may add up longer sums in another order."""
    without, new, moved = ranks(1, joined)[0]
    assert abs(new - without) <= 1e-15 * without and abs(moved - without) > 1e-6 * without


def one_level_parts() -> tuple[list[str], dict[str, int], int, float]:
    model, value, _ = whole("levels=[{name: all, period: 1, width: 1.0}]")
    run = tiny("levels=[{name: all, period: 1, width: 1.0}]")
    return (
        list(value),
        parameters(run.model, run.levels),
        sum(v.numel() for v in value.values()),
        flops_a_token(run.model, run.levels, 16),
    )


def test_one_level_is_a_plain_transformer_and_the_count_is_the_models() -> None:
    ((names, by_formula, counted, flops),) = ranks(1, one_level_parts)
    assert by_formula == {"all": counted}
    assert [name for name in names if "blocks.0" in name] == [
        *(f"blocks.0.mix.{part}.weight" for part in ("norm", "q", "k", "v", "out")),
        "blocks.0.continuum.norm.weight",
        *(f"blocks.0.continuum.all.{part}.weight" for part in ("gate", "up", "down")),
    ]
    matrices = counted - 128 * 32 - 9 * 32  # neither the embedding nor norms multiply
    assert flops == 6 * matrices + 6 * 4 * 16 * 32


def named(variant: str) -> list[str]:
    return list(whole(f"model.variant={variant}")[1])


@pytest.mark.parametrize("variant", ["independent", "sequential"])
def test_every_leaf_has_exactly_one_initial_value(variant: str) -> None:
    (names,) = ranks(1, named, variant)
    for name in names:
        assert sum(fnmatchcase(name, pattern) for pattern, _ in TABLE) == 1, name


def test_a_slice_of_the_initial_values_is_drawn_like_the_whole() -> None:
    all_rows, part = torch.empty(300, 3), torch.empty(90, 3)
    draw(all_rows, 0, "seed:name", 0.02)
    draw(part, 130, "seed:name", 0.02)
    assert torch.equal(part, all_rows[130:220])
    assert all_rows.std() == pytest.approx(0.02, rel=0.1)


def causal_and_apart() -> tuple[bool, bool]:
    """Whether a later token, and a token of another document, leave a hidden state as it was."""
    model, _, _ = whole()
    tokens = torch.randint(1, 128, (1, 16))
    starts = torch.zeros(1, 16, dtype=torch.bool)
    starts[0, [0, 8]] = True

    def states(tokens: Tensor) -> Tensor:
        x = model.enter(tokens)
        for block in model.blocks:
            x, _ = block(x, model.scene(starts))
        return x[:, 0]

    base = states(tokens)
    later, other = tokens.clone(), tokens.clone()
    later[0, 12] += 1 - 2 * (later[0, 12] > 64).long()
    other[0, 3] += 1 - 2 * (other[0, 3] > 64).long()
    after_later, after_other = states(later), states(other)
    assert not torch.equal(after_later[12:], base[12:]) and not torch.equal(after_other[3:8], base[3:8])
    return torch.equal(after_later[:12], base[:12]), torch.equal(after_other[8:], base[8:])


def test_attention_is_causal_and_keeps_documents_apart() -> None:
    assert ranks(1, causal_and_apart)[0] == (True, True)


def test_document_mask_by_hand() -> None:
    nowhere = torch.zeros(3, 1, 1, 4)
    mask = scene((nowhere, nowhere), torch.tensor([[False, True, False]]), None).mask
    assert mask is not None
    assert mask.tolist() == [[[[True, False, False], [False, True, False], [False, True, True]]]]


def guest(tensor: int) -> float:
    """Loss of a megatron-core GPTModel whose mlp is our continuum."""
    run = tiny(f"parallel.tensor={tensor}")
    world = join(Parallel(tensor=tensor), run.cluster, 0)
    torch._dynamo.config.disable = True  # its compiler processes do not survive a fork
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    config = transformer_config(run.model, run.parallel, torch.float32, world.device)
    config.perform_initialization = True  # a guest's layers mark their split only then
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.mlp = continuum_spec(Levels(levels=run.levels).units(64))
    spec.submodules.pre_mlp_layernorm = IdentityOp
    model = GPTModel(config, spec, 128, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            rows = parameter.movedim(axis or 0, 0)
            draw(rows, world.tensor_rank * rows.shape[0] if axis is not None else 0, name, 0.02)
        for layer in model.decoder.layers:
            leaves = list(prefixed("blocks.0.continuum", layer.mlp.continuum.leaves()))
            initialize(leaves, run.model, 0, world.tensor_rank)
    ids = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    return float(model(ids[:, :-1], torch.arange(16).expand(2, 16), mask, labels=ids[:, 1:]).mean())


def test_another_megatron_program_can_use_the_continuum() -> None:
    (one,) = ranks(1, guest, 1)
    assert one == pytest.approx(4.85, abs=0.1)  # about ln 128
    assert ranks(2, guest, 2) == pytest.approx([one, one], rel=1e-5)


def test_stages_cover_the_layers_once() -> None:
    run = tiny("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    held = [stage for rank in range(2) for stage in stages(run, rank)]
    assert sorted(layer for stage in held for layer in stage.layers) == [0, 1, 2, 3]
    assert [(s.layers.start, s.first, s.last) for s in held] == [
        (0, True, False),
        (2, False, False),
        (1, False, False),
        (3, False, True),
    ]
