"""Files of a family that has nothing of the MMDiT: the reader, the writer and adapters know formats only.

Truth is written here with reshapes and concatenations of whole tensors.
"""

import argparse
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.mmdit.convert import WEIGHTS as WEIGHTS_OF_MMDIT
from opensora.models.weights.adapter_export import convert_adapter, trained_adapter, write_adapter
from opensora.models.weights.adapter_fit import fit_adapter
from opensora.models.weights.adapter_names import WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.models.weights.format import WeightFormat
from opensora.models.weights.plain import PlainWeights
from opensora.models.weights.reader import WeightFile, load_into, load_state_dict_for, read_state_dict
from opensora.models.weights.rows import Rows, Shape, Target, build, height, joined
from opensora.models.weights.writer import assemble, convert_shapes, convert_state_dict, save_state_dict, shapes_of
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from tests.film_weights import BLOCKS, FILM, OURS, OUT, PATCH, PUBLISHED, C, D, Film, FilmLayout, FilmWeights


def random_state(seed: int | str = 0) -> dict[str, Tensor]:
    """Of our model."""
    return {
        name: torch.randn(tensor.shape, generator=torch_generator("film", seed, name))
        for name, tensor in Film().state_dict().items()
    }


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truth: our weights as they were published."""
    made = {
        "x_embedder.proj.weight": state["embed.weight"].reshape(D, C, *PATCH),
        "x_embedder.proj.bias": state["embed.bias"],
        "y_embedder.y_embedding": state["nothing"],
        "strength": state["strength"][0],
    }
    t, h, w = PATCH
    for kind in ("weight", "bias"):
        made[f"final_layer.linear.{kind}"] = rearrange(
            state[f"last.{kind}"], "(c t h w) ... -> (t h w c) ...", c=C, t=t, h=h, w=w
        )
        for i in range(BLOCKS):
            for part, tensor in zip("qkv", state[f"blocks.{i}.qkv.{kind}"].chunk(3), strict=True):
                made[f"layers.{i}.attn.to_{part}.{kind}"] = tensor
            made[f"layers.{i}.cross.kv_linear.{kind}"] = torch.cat([state[f"blocks.{i}.{p}.{kind}"] for p in "kv"])
            made[f"layers.{i}.attn.proj.{kind}"] = state[f"blocks.{i}.out.{kind}"]
    for i in range(BLOCKS):
        made[f"layers.{i}.scale_shift_table"] = state[f"blocks.{i}.table"][None]
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_both_ways_in_memory() -> None:
    state = random_state()
    assert same(convert_state_dict(state, FILM, to=PUBLISHED), published(state))
    assert same(convert_state_dict(published(state), FILM, to=OURS), state)
    shapes = convert_shapes(shapes_of(state), FILM, source=OURS, to=PUBLISHED)
    assert shapes == shapes_of(published(state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module._orig_mod."])
def test_published_files_are_loaded_strictly(prefix: str, tmp_path: Path) -> None:
    """Behind a prefix, with an empty prompt that is shorter than ours, and positions that are left out with a word."""
    state = random_state()
    file = published(state)
    file["y_embedder.y_embedding"] = file["y_embedder.y_embedding"][:3].clone()
    state["nothing"][3:] = state["nothing"][2]
    file |= {"pos_embed": torch.zeros(1, 9, D), "pos_embed_temporal": torch.zeros(1, 4, D)}
    save_file({f"{prefix}{name}": tensor for name, tensor in file.items()}, tmp_path / "m.safetensors")
    model = Film()
    report = load_into(model, tmp_path, FILM, to=OURS)
    assert same(model.state_dict(), state)
    assert report.layout == PUBLISHED and report.prefix == prefix.replace("_orig_mod.", "")
    assert "2 computed by the model and not read: pos_embed, pos_embed_temporal" in str(report)
    assert read_state_dict(tmp_path, FILM)[1] == PUBLISHED


def test_what_does_not_fit_is_said_in_the_familys_words(tmp_path: Path) -> None:
    file = published(random_state())
    del file["layers.1.scale_shift_table"]
    save_file(file, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"1 missing: blocks\.1\.table; choose the film of this file"):
        load_state_dict_for(Film(), tmp_path, FILM, to=OURS)
    assert load_into(Film(), tmp_path, FILM, to=OURS, allow_missing=FILM.may_lack).left_at_init == ("blocks.1.table",)
    save_file({**file, "layers.0.odd": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected: layers\.0\.odd"):
        load_state_dict_for(Film(), tmp_path, FILM, to=OURS)
    for shape in ((D, 2 * C, *PATCH), (2 * D, C, *PATCH), (D, OUT, 1), ()):  # the last but one has as many values
        odd = {**published(random_state()), "x_embedder.proj.weight": torch.zeros(shape)}
        save_file(odd, tmp_path / "m.safetensors")
        if shape == (D, OUT, 1):
            load_state_dict_for(Film(), tmp_path, FILM, to=OURS)
            continue
        with pytest.raises(UserError, match=r"1 of another shape .* embed\.weight .*, ") as caught:
            load_state_dict_for(Film(), tmp_path, FILM, to=OURS)
        assert f"embed.weight {shape}, {(D, OUT)}" in str(caught.value)
    save_file({"reel.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="these are reels; give films"):
        WeightFile(tmp_path, FILM)


class Program:
    """What a file must not be able to run."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit(3)",)


def test_files_of_torch_save_where_the_format_says_so(tmp_path: Path) -> None:
    """Bare, or a checkpoint with more in it; given alone, or the one in a folder."""
    state = random_state()
    file = published(state)
    others = {"epoch": 3, "optimizer": {"state": {}}, "args": ["a"]}
    for number, content in enumerate((file, {**others, "state_dict": file}, {"ema": file, "model": random_state(1)})):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(content, folder / "film.pth")
        for path in (folder, folder / "film.pth"):
            assert same(dict(WeightFile(path, FILM, OURS)), state)
            part = torch.zeros(2, 3)
            assert WeightFile(path, FILM, OURS).read_part("last.weight", (4, 1), part)
            assert torch.equal(part, state["last.weight"][4:6, 1:4])
        with pytest.raises(UserError, match=r"is a file of torch\.save.*nothing is unpickled"):
            WeightFile(folder / "film.pth", WEIGHTS_OF_MMDIT)
        with pytest.raises(UserError, match=r"no safetensors, and nothing is unpickled \(film\.pth\)"):
            WeightFile(folder, WEIGHTS_OF_MMDIT)
    (tmp_path / "0/other.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds 2 files of weights \(film\.pth, other\.pt\): give one of them"):
        WeightFile(tmp_path / "0", FILM)


def test_what_torch_save_may_not_hold(tmp_path: Path) -> None:
    path, file = tmp_path / "film.pt", published(random_state())
    for content, expected in (
        ({"state_dict": file, "args": Program()}, "holds more than tensors, which could be a program"),
        ([1, 2], "it holds no tensors by name"),
        ({}, "it holds no tensors by name"),
        ({"weights": file}, r"'weights' is no tensor; a checkpoint has its weights under ema or state_dict"),
        ({**file, 3: torch.zeros(1)}, "3 is no tensor"),
        ({**file, "strength": torch.zeros(1, dtype=torch.int32)}, "strength is torch.int32: must be one of F64"),
        ({**file, "strength": torch.eye(2).to_sparse()}, "'strength' is no tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=expected) as caught:
            WeightFile(path, FILM)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def old_file(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def holds(path: Path, state: Mapping[str, Tensor]) -> bool:
    """Whether files are read, and hold just this."""
    try:
        return same(dict(WeightFile(path, FILM, OURS)), state)
    except UserError:
        return False


def test_files_of_torch_save_before_they_were_zips(tmp_path: Path) -> None:
    state, path = random_state(), tmp_path / "film.pth"
    for content in (published(state), {"epoch": 3, "state_dict": published(state)}):
        old_file(content, path)
        assert holds(path, state) and holds(tmp_path, state)
        with pytest.raises(UserError, match="is a pickle, not safetensors: nothing is unpickled"):
            WeightFile(path, WEIGHTS_OF_MMDIT)
    for content in ({"state_dict": published(state), "args": Program()}, Program()):
        old_file(content, path)
        with pytest.raises(UserError, match="holds more than tensors, which could be a program"):
            WeightFile(path, FILM)
    path.write_bytes(pickle.dumps(published(state)))
    with pytest.raises(UserError, match="is a pickle, not safetensors: nothing is unpickled"):
        WeightFile(path, FILM)


def test_options_beside_weights_are_read_and_run_nothing(tmp_path: Path) -> None:
    """As training checkpoints of DiT have them: attributes of plain values, and of nothing else."""
    state, path = random_state(), tmp_path / "film.pt"
    plain = argparse.Namespace(lr=1e-4, model="DiT-XL/2", sizes=[1, 2], more=argparse.Namespace(x=None))
    for save in (torch.save, old_file):
        save({"ema": published(state), "opt": {"state": {}}, "args": plain}, path)
        assert holds(path, state)
        for value in (Program(), [Program()], {"a": Program()}, argparse.Namespace(b=Program()), exec, Program):
            save({"ema": published(state), "args": argparse.Namespace(a=value)}, path)
            with pytest.raises(UserError, match="holds more than tensors, which could be a program"):
                WeightFile(path, FILM)
    torch.save({**published(state), "args": plain}, path)
    with pytest.raises(UserError, match="'args' is no tensor"):
        WeightFile(path, FILM)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # for no other reader of the process


@pytest.mark.parametrize("name", ["film.pt", "film.pth", "film.ckpt", "film.bin"])
def test_what_is_called_a_file_of_torch_save_and_is_none(name: str, tmp_path: Path) -> None:
    for content in (b"", b"not a checkpoint, a text", b"\0" * 40):
        (tmp_path / name).write_bytes(content)
        for format in (FILM, WEIGHTS_OF_MMDIT):
            with pytest.raises(UserError, match=rf"{name}: cannot be read as a file of torch\.save, nor as safet"):
                WeightFile(tmp_path / name, format)


@pytest.mark.parametrize("save", [torch.save, old_file], ids=["zip", "before zips"])
def test_damaged_files_of_torch_save_are_refused_in_a_line(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save(published(random_state()), tmp_path / "whole.pt")
    content, draw = (tmp_path / "whole.pt").read_bytes(), random.Random(0)
    taken = 0
    for _ in range(300):
        data = bytearray(content)
        for _ in range(draw.choice([1, 3])):
            at = draw.randrange(draw.choice([100, 2000, len(data)]))
            data[at : at + draw.choice([0, 1, 9])] = draw.randbytes(draw.choice([0, 1, 4]))
        (tmp_path / "m.pt").write_bytes(bytes(data[: draw.choice([len(data), draw.randrange(1, len(data))])]))
        try:
            load_state_dict_for(Film(), tmp_path / "m.pt", FILM, to=OURS)
            taken += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
    assert 0 < taken < 300


class Forgetful(FilmWeights):
    """A format that loses a tensor."""

    def targets(self, shapes: Mapping[str, Shape], source: FilmLayout, to: FilmLayout) -> dict[str, Target]:
        return {k: target for k, target in super().targets(shapes, source, to).items() if "odd" not in k}


def test_a_tensor_that_a_format_loses_is_unexpected(tmp_path: Path) -> None:
    save_file({**random_state(), "blocks.0.odd": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.odd"):
        load_state_dict_for(Film(), tmp_path, Forgetful(), to=OURS)


@pytest.mark.parametrize("to", [OURS, PUBLISHED])
def test_written_in_any_layout_in_shards_and_read_back(to: FilmLayout, tmp_path: Path) -> None:
    state = random_state()
    files = save_state_dict(state, tmp_path, FILM, source=OURS, to=to, metadata={"step": "3"}, shard_bytes=1000)
    assert len(files) > 3
    stored = {name: tensor for file in files[:-1] for name, tensor in load_file(file).items()}
    assert same(stored, published(state) if to.published else state)
    for wanted in (OURS, PUBLISHED):
        found = WeightFile(tmp_path, FILM, wanted)
        assert found.layout == to and same(dict(found), published(state) if wanted.published else state)


@pytest.mark.parametrize("to", [OURS, PUBLISHED])
@pytest.mark.parametrize("written", [OURS, PUBLISHED])
def test_parts_are_read_without_the_rest(written: FilmLayout, to: FilmLayout, tmp_path: Path) -> None:
    """Of any number of processes, and any rows and columns. No more values than those, and the rest of their groups."""
    state = random_state()
    save_file(published(state) if written.published else state, tmp_path / "m.safetensors")
    file = WeightFile(tmp_path, FILM, to)
    asked = count_values(file)
    draw = random.Random(f"{written} {to}")
    for name, tensor in (published(state) if to.published else state).items():
        rows = height(tuple(tensor.shape))
        cuts = [(rank * rows // world, (rank + 1) * rows // world) for world in (1, 2, 3, 5) for rank in range(world)]
        for start, stop in cuts if tensor.dim() else ():
            begin = [draw.randrange(size) for size in tensor.shape[1:]]
            ends = [draw.randint(b + 1, size) for b, size in zip(begin, tensor.shape[1:], strict=True)]
            index = (slice(start, stop), *(slice(b, e) for b, e in zip(begin, ends, strict=True)))
            for at, where in (((start, *begin), index), ((start, *[0] * len(begin)), index[:1])):
                wanted = tensor[where]
                part = torch.full_like(wanted, torch.nan)
                asked.clear()
                assert file.read_part(name, at, part) and torch.equal(part, wanted), (name, where)
                free = "last" in name or "final" in name or wanted.numel() == 0 or written != to
                assert free or sum(asked) == wanted.numel(), (name, where)
                assert sum(asked) <= max(tensor.numel(), (stop - start + 1) * tensor[:1].numel())
        if not tensor.dim():
            part = torch.zeros(())
            assert file.read_part(name, (), part) and torch.equal(part, tensor)
    assert not file.read_part("x_embedder", (0,), torch.zeros(1))


def count_values(file: WeightFile) -> list[int]:
    """How many values are taken from the file from now on, an entry per read."""
    asked: list[int] = []
    get = file._get

    def counting(name: str, index: tuple[slice, ...]) -> Tensor:
        found = get(name, index)
        asked.append(found.numel())
        return found

    file._get = counting  # type: ignore[method-assign]
    return asked


# -- Adapters --


def low_rank(rows: int, columns: int, *seed: int | str) -> tuple[Tensor, Tensor]:
    draw = torch_generator("low", *seed)
    return torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw)


LAYERS = {  # published name -> outputs
    "layers.0.attn.to_q": D,
    "layers.0.attn.to_v": D,
    "layers.1.cross.kv_linear": 2 * D,
    "layers.2.attn.proj": D,
    "final_layer.linear": OUT,
}


def with_published_adapters(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The truth: our weights with adapters that were made for the published ones."""
    file = {name: tensor.double() for name, tensor in published(state).items()}
    for layer, rows in LAYERS.items():
        a, b = low_rank(rows, D, layer)
        file[f"{layer}.weight"] += scale * b.double() @ a.double()
    return convert_state_dict(file, FILM, to=OURS, source=PUBLISHED)


def merged(state: Mapping[str, Tensor], path: Path, layout: FilmLayout) -> tuple[dict[str, Tensor], str, str]:
    """(weights with the adapters of a file, their prefix, what is said of a guess)."""
    fitted, plan = fit_adapter(read_adapter(path), shapes_of(state), FILM, layout)
    found = {name: tensor.double() for name, tensor in state.items()}
    for layer, (_, scale) in fitted.sizes().items():
        a, b = (fitted.tensor(f"{layer}.{kind}.weight").double() for kind in ("lora_A", "lora_B"))
        found[f"{layer}.weight"] += scale * b @ a
    return found, plan.prefix, plan.guess


@pytest.mark.parametrize("style", ["diffusion_model.{}", "lora_unet_{}", "{}"])
def test_adapters_for_published_weights(style: str, tmp_path: Path) -> None:
    """Of one of our fused parts alone, of two of our layers, of permuted rows; with dots or underscores."""
    tensors = {}
    for layer, rows in LAYERS.items():
        name = style.format(layer.replace(".", "_") if "unet" in style else layer)
        a, b = low_rank(rows, D, layer)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    state = random_state()
    found, prefix, guess = merged(state, tmp_path / "a.safetensors", OURS)
    wanted = with_published_adapters(state, 1.5)
    assert prefix == style.removesuffix("{}") and guess == "taken for published"
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-12, name
    assert any(not torch.equal(wanted[f"{name}.weight"], state[f"{name}.weight"].double()) for name in ("last",))


def test_our_adapters_for_other_tools_and_back(tmp_path: Path) -> None:
    """Written for peft in our layout and for ComfyUI in the published one: read back, both are the same adapters."""
    state = random_state()
    tensors = {}
    for layer in ("blocks.0.qkv", "blocks.1.k", "blocks.2.out", "last"):
        a, b = low_rank(state[f"{layer}.weight"].shape[0], D, layer)
        b = b.bfloat16().float()  # so few digits that alpha/rank, which ComfyUI's file has in B, rounds none away
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    ours = trained_adapter(tensors, 1.5)
    write_adapter(tmp_path / "peft", ours, "peft", metadata=OURS.metadata())
    renamed = convert_adapter(ours, shapes_of(state), FILM, source=OURS, to=PUBLISHED)
    write_adapter(tmp_path / "comfyui", renamed, "comfyui", metadata=PUBLISHED.metadata())
    assert {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "comfyui" / WEIGHTS)} == {
        *(f"diffusion_model.layers.0.attn.to_{part}" for part in "qkv"),
        *(f"diffusion_model.{name}" for name in ("layers.1.cross.kv_linear", "layers.2.attn.proj")),
        "diffusion_model.final_layer.linear",
    }
    truth = {name: tensor.double() for name, tensor in state.items()}
    for layer in ("blocks.0.qkv", "blocks.1.k", "blocks.2.out", "last"):
        a, b = (tensors[f"{layer}.{kind}.weight"].double() for kind in ("lora_A", "lora_B"))
        truth[f"{layer}.weight"] += 1.5 * b @ a
    for folder in ("peft", "comfyui"):
        for layout in (OURS, PUBLISHED):
            base = published(state) if layout.published else state
            found, _, guess = merged(base, tmp_path / folder, layout)
            wanted = published(truth) if layout.published else truth
            assert guess == ""
            assert all((found[name] - tensor).abs().max() <= 1e-12 for name, tensor in wanted.items())


def test_adapters_for_the_same_rows_are_refused(tmp_path: Path) -> None:
    """Our name and the published one of the same layer; parts of it beside each other are not the same."""

    def write(layers: Mapping[str, int]) -> Path:
        tensors = {}
        for layer, rows in layers.items():
            a, b = low_rank(rows, D, layer)
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        save_file(tensors, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    state = random_state()
    for second, rows in (("layers.0.attn.to_k", D), ("blocks.1.qkv", 3 * D)):
        merged(state, write({"layers.0.attn.to_q": D, second: rows}), OURS)
    for both in ({"blocks.0.qkv": 3 * D, "layers.0.attn.to_k": D}, {"last": OUT, "final_layer.linear": OUT}):
        with pytest.raises(ValueError, match="two adapters for the same place"):
            merged(state, write(both), OURS)
    with pytest.raises(ValueError, match=r"layers\.9\.attn\.proj: the model has no such layer"):
        merged(state, write({"layers.9.attn.proj": D}), OURS)
    with pytest.raises(ValueError, match=r"8 -> 9, and would be 8 -> 8 for this model"):
        merged(state, write({"layers.0.attn.proj": 9}), OURS)


def test_a_family_without_conversions(tmp_path: Path) -> None:
    state = random_state()
    plain: WeightFormat = PlainWeights(
        top_level=("embed", "blocks", "nothing", "strength", "last"), example_layer="blocks.0.out"
    )
    named = {f"module.{name}": tensor for name, tensor in state.items()}
    save_file(named, tmp_path / "m.safetensors")
    model = Film()
    assert load_into(model, tmp_path, plain, to=plain.layout(None)).prefix == "module."
    assert same(model.state_dict(), state)
    a, b = low_rank(3 * D, D, "plain")
    tensors = {"lora_unet_blocks_1_qkv.lora_down.weight": a, "lora_unet_blocks_1_qkv.lora_up.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    fitted, plan = fit_adapter(read_adapter(tmp_path / "a.safetensors"), shapes_of(state), plain, plain.original)
    assert torch.equal(fitted.tensor("blocks.1.qkv.lora_B.weight"), b) and plan.guess == ""


# -- Rows, at random --


def random_target(draw: random.Random, stored: Mapping[str, np.ndarray]) -> tuple[Target, np.ndarray]:
    """Rows of any tensors in any order, in another shape; and the same by whole arrays."""
    row = draw.choice([(), (4,), (2, 2), (6,), (1, 4), (12,)])
    size = int(np.prod(row))
    pieces, values = [], []
    fitting = [name for name in sorted(stored) if stored[name].size and stored[name].size % size == 0]
    for _ in range(draw.randint(1, 4)):
        name = draw.choice(fitting)
        array = stored[name].reshape(-1, *row)
        groups = [n for n in range(1, len(array) + 1) if len(array) % n == 0]
        group = draw.choice(groups)
        order = None if draw.random() < 0.4 else tuple(draw.sample(range(group), group))
        if order is not None:
            array = array.reshape(-1, group, *row)[:, list(order)].reshape(-1, *row)
        start = draw.randrange(len(array))
        stop = draw.randint(start + 1, len(array))
        pieces.append(Target((stop - start, *row), (Rows(name, start, stop, order),)))
        values.append(array[start:stop])
    return joined(*pieces), np.concatenate(values)


def check_random_rows(seed: int, folder: Path) -> None:
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    shapes: list[Shape] = [(12, 4), (24,), (6, 2, 2), (1, 6, 4), (8, 3, 1, 2), (1,), (), (2, 12), (0, 4)]
    stored = {f"t{i}": numbers.standard_normal(shape) for i, shape in enumerate(shapes)}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in stored.items()}
    made = {f"m{i}": random_target(draw, stored) for i in range(6)}
    targets = {name: target for name, (target, _) in made.items()}
    for name, tensor in assemble(tensors, targets).items():
        assert np.array_equal(tensor.numpy(), made[name][1]), (seed, name)

    class Drawn(FilmWeights):
        def targets(self, shapes: Mapping[str, Shape], source: FilmLayout, to: FilmLayout) -> dict[str, Target]:
            return targets

    save_file(tensors, folder / "m.safetensors")
    file = WeightFile(folder / "m.safetensors", Drawn(), OURS)
    for name, (target, array) in made.items():
        assert np.array_equal(file[name].numpy(), array), (seed, name)
        begin = [draw.randrange(size) for size in array.shape]
        end = [draw.randint(b, size) for b, size in zip(begin, array.shape, strict=True)]
        wanted = array[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))]
        part = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        assert file.read_part(name, tuple(begin), part) and np.array_equal(part.numpy(), wanted), (seed, name)
        if target.shape[0]:
            assert torch.equal(build(target, shapes_of(tensors), lambda t, at: tensors[t][at]), file[name])


def test_random_rows(tmp_path: Path) -> None:
    for seed in range(200):
        check_random_rows(seed, tmp_path)


@pytest.mark.slow
def test_many_random_rows(tmp_path: Path) -> None:
    for seed in range(200, 10_200):
        check_random_rows(seed, tmp_path)
