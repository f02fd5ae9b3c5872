"""The family's Python interface without files: goldens through its names, own models of a script, and its errors."""

import inspect
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.inference.scripts.given_models import TextPart
from opensora.inference.scripts.interface import OptionalModels
from opensora.models.base import TextFeatures
from opensora.models.layers.embedding import sinusoid
from opensora.models.layers.rope import rope_table
from opensora.models.mmdit import SIZES, MMDiTModel
from opensora.sampling.options import SamplingMethod
from opensora.utils.errors import UserError
from opensora.utils.inference import process_and_save
from opensora.utils.sampling import SamplingOption, get_noise, prepare, prepare_api, prepare_ids
from tests.toy_components import ToyAutoencoder, toy_velocity
from tests.unit.test_golden_sampling import API, PROMPTS, TOLERANCE, api_cases, frames_of, relative


def own_models(tensors: dict[str, Tensor], *, causal: bool = True) -> tuple[Any, ...]:
    """Functions, as a script may have them: the toys of the golden tensors, by the names of the family alone."""

    def model(**given: Any) -> Tensor:
        assert set(given) == {"img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance"}
        return toy_velocity(tensors, **{name: x for name, x in given.items() if name != "txt_ids"})

    def t5(prompts: list[str]) -> Tensor:
        return torch.stack([tensors[f"in.txt.{prompt or 'EMPTY'}"] for prompt in prompts])

    def clip(prompts: list[str]) -> Tensor:
        return torch.stack([tensors[f"in.y_vec.{prompt or 'EMPTY'}"] for prompt in prompts])

    return model, ToyAutoencoder(tensors["ae.mix"], causal=causal), t5, clip, {}


def option_of(case: dict[str, Any], **more: Any) -> SamplingOption:
    given = {name: case[name] for name in ("width", "height", "method", "flow_shift") if name in case}
    guidance, steps = case["guidance_seen"], case["steps"]
    return SamplingOption(num_frames=case["frames"], num_steps=steps, guidance=guidance, **given, **more)


@pytest.mark.parametrize("name", API)
def test_from_noise_to_pixels(golden: Path, name: str) -> None:
    """As tests/unit/test_golden_sampling.py, by the names of the interface; the scale of the prompt is handed over."""
    tensors, case = load_file(golden / "sampling_api.safetensors"), api_cases(golden)[name]
    api_fn = prepare_api(*own_models(tensors, causal=case["causal"]))
    batch = {"text": PROMPTS, "neg": case["neg"], "ref": frames_of(tensors, case["ref"])}
    noise = tensors[f"in.{name}.noise"]
    pixels = api_fn(option_of(case), case["cond_type"], patch_size=2, channel=4, noise=noise, **batch)
    assert list(pixels.shape) == case["pixels"]
    rows = 1 if case["ref"] and case["cond_type"].startswith("i2v") else 2
    assert relative(pixels[:rows, ..., ::8, ::8], tensors[f"out.{name}.pixels"][:rows]) <= TOLERANCE


def test_an_autoencoder_that_says_nothing_of_itself(golden: Path) -> None:
    """Has the stride of the family's."""
    tensors, case = load_file(golden / "sampling_api.safetensors"), api_cases(golden)["t2v"]
    model, autoencoder, *texts = own_models(tensors)

    class Plain:
        encode, decode = staticmethod(autoencoder.encode), staticmethod(autoencoder.decode)

    batch = {"text": PROMPTS, "noise": tensors["in.t2v.noise"]}
    pixels = prepare_api(model, Plain(), *texts)(option_of(case), channel=4, **batch)
    assert relative(pixels[..., ::8, ::8], tensors["out.t2v.pixels"]) <= TOLERANCE


@pytest.fixture(scope="module")
def network() -> MMDiTModel:
    torch.manual_seed(0)
    return MMDiTModel(replace(SIZES["debug"], vec_in_dim=5, context_in_dim=6)).eval()


def api_of(network: MMDiTModel) -> Any:
    """A model of a script's own that says its sizes."""

    def t5(prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 3, 6)

    return prepare_api(network, ToyAutoencoder(torch.randn(4, 3)), t5, lambda prompts: torch.zeros(len(prompts), 5), {})


OPTION = SamplingOption(width=32, height=32, num_frames=3, num_steps=1, guidance=2.0)


def test_defaults_are_those_of_the_model(network: MMDiTModel) -> None:
    api_fn = api_of(network)
    given = {name: one.default for name, one in inspect.signature(api_fn).parameters.items()}
    assert (given["cond_type"], given["seed"], given["patch_size"], given["channel"]) == ("t2v", None, 2, 4)
    assert api_fn(OPTION, text="a cat").shape == (1, 3, 3, 32, 32)
    same = [api_fn(OPTION, text=["a"], channel=channel, patch_size=2) for channel in (4, 16)]
    assert torch.equal(*same)
    plain = inspect.signature(prepare_api(lambda **_: None, None, None, None)).parameters
    assert (plain["patch_size"].default, plain["channel"].default) == (2, 16)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "patch": ({"patch_size": 1}, "patch_size=1: must be 2, that of the model"),
    "channels": ({"channel": 8}, "channel=8: must be 4, the channels of the model's latents, 16, those of its tokens"),
    "kind": ({"cond_type": "i2v_haed"}, "cond_type=i2v_haed: must be one of t2v, i2v_head"),
    "key": ({"texts": ["b"]}, "batch.texts: unknown key; did you mean text?"),
    "far key": ({"zzz": ["b"]}, "batch.zzz: unknown key; must be one of text, ref, neg, name, index"),
    "no text": ({"text": None}, "batch.text: missing; give a list of prompts"),
    "empty text": ({"text": []}, "batch.text: must be a list with a text for every clip"),
    "text of numbers": ({"text": [1]}, "batch.text: must be a list with a text for every clip"),
    "too few negatives": ({"text": ["a", "b"], "neg": ["c"]}, "batch.neg: 1 entries for 2 prompts"),
    "too many references": ({"ref": ["a.png", "b.png"]}, "batch.ref: 2 entries for 1 prompts"),
    "references of nothing": ({"ref": ["a.png"]}, "ref: 1 reference for a clip, cond_type=t2v takes none"),
    "three references": ({"ref": ["a;b;c"], "cond_type": "i2v_loop"}, "ref: 3 references for a clip"),
    "no such file": ({"ref": ["a.png"], "cond_type": "i2v_head"}, "ref=a.png: no such file"),
    "short clip": ({"ref": [[torch.zeros(3, 9, 8, 8)]], "cond_type": "v2v_head"}, "sampling.num_frames=3: must be"),
    "seed": ({"seed": -1}, "seed=-1: must be an integer from 0 to 2^63-1"),
    "seeds": ({"seed": [1, 2]}, "seed=[1, 2]: must be an integer from 0 to 2^63-1, or one per clip"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_costs_a_line(network: MMDiTModel, case: str) -> None:
    given, expected = BAD[case]
    with pytest.raises(UserError) as error:
        api_of(network)(OPTION, **{"text": ["a"]} | given)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value), error.value


def test_pixels_that_do_not_fit_their_batch(tmp_path: Path) -> None:
    cfg = {"weights": "w", "save_dir": str(tmp_path / "out")}
    for shape, batch, expected in (
        ((2, 3, 1, 8, 8), {"text": ["a"]}, "x: has shape (2, 3, 1, 8, 8), must be (B, 3, T, H, W) with B=1"),
        ((1, 4, 1, 8, 8), {"text": ["a"]}, "x: has shape"),
        ((1, 3, 1, 8, 8), {"text": ["a"], "on_step": None}, "batch.on_step: unknown key"),
        ((1, 3, 1, 8, 8), {"text": ["a"], "name": ["a/b"]}, "batch.name: 'a/b' "),
    ):
        with pytest.raises(UserError) as error:
            process_and_save(torch.zeros(shape), batch, cfg, "x", OPTION)
        assert str(error.value).startswith(expected), error.value
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()


def test_methods_by_the_names_of_the_family() -> None:
    assert SamplingOption(method=SamplingMethod.DISTILLED) == SamplingOption(method="distill")  # type: ignore[arg-type]
    assert type(SamplingOption(method=SamplingMethod.I2V).method) is str  # type: ignore[arg-type]
    one = get_noise(1, 32, 32, 5, "cpu", torch.float32, 3, 2, 16)
    assert torch.equal(one, get_noise(1, 32, 32, 5, seed=3))
    with pytest.raises(TypeError, match="seed is missing"):
        get_noise(1, 32, 32, 5)


def test_prepare_is_what_a_forward_reads(golden: Path) -> None:
    """Latents are repeated for the texts of all passes; tokens and their places as in the golden packing."""
    t = load_file(golden / "packing.safetensors")
    latents = t["in.z"]
    texts = ["a", "b"] * 3 if len(latents) == 2 else ["a"] * 3 * len(latents)
    given = prepare(lambda p: torch.ones(len(p), 4, 6), lambda p: torch.ones(len(p), 5), latents, texts)
    assert torch.equal(given["img"], t["out.packed"].repeat(3, 1, 1))
    assert torch.equal(given["img_ids"][:1].float(), t["out.img_ids"][:1]) and len(given["img_ids"]) == len(texts)
    assert given["txt_ids"].shape == (len(texts), 4, 3) and not given["txt_ids"].any()
    alone = prepare_ids(latents, given["txt"][: len(latents)], given["y_vec"][: len(latents)])
    assert all(torch.equal(x, given[name][: len(latents)]) for name, x in alone.items())


@pytest.mark.parametrize("distilled", [False, True])
def test_inputs_of_the_first_block(distilled: bool) -> None:
    """Written out: embeddings of time, prompt and guidance add up; cond is added to the image; text comes first."""
    torch.manual_seed(1)
    cfg = replace(SIZES["debug"], vec_in_dim=5, context_in_dim=6, guidance_embed=distilled)
    model = MMDiTModel(cfg)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    img, txt, y_vec, cond = draw(2, 7, 16), draw(2, 3, 6), draw(2, 5), draw(2, 7, 20)
    img_ids, txt_ids, t = draw(2, 7, 3), torch.zeros(2, 3, 3), torch.tensor([0.25, 0.75])
    scale = torch.tensor([3.0, 4.0]) if distilled else None
    found = model.prepare_block_inputs(img, img_ids, txt, txt_ids, t, y_vec, cond=cond, guidance=scale)
    vec = model.time_in(sinusoid(t, 256)) + model.vector_in(y_vec)
    if distilled:
        vec = vec + model.guidance_in(sinusoid(scale, 256))  # type: ignore[misc]
    assert torch.allclose(found[0], img @ model.img_in.weight.T + model.img_in.bias + model.cond_in(cond), atol=1e-6)  # type: ignore[misc]
    assert torch.allclose(found[1], txt @ model.txt_in.weight.T + model.txt_in.bias, atol=1e-6)
    assert torch.allclose(found[2], vec, atol=1e-6)
    table = rope_table(torch.cat((txt_ids, img_ids), dim=1), cfg.axes_dim, cfg.theta, cfg.rope_layout)
    assert all(torch.equal(one, other) for one, other in zip(found[3], table, strict=True))
    with pytest.raises(ValueError, match="cond is missing"):
        model.prepare_block_inputs(img, img_ids, txt, txt_ids, t, y_vec, guidance=scale)


class Counting:
    """A text encoder that counts how often it is asked."""

    context_dim, vec_dim = 6, 5

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, prompts: list[str]) -> TextFeatures:
        self.calls.append(prompts)
        return TextFeatures(txt=torch.ones(len(prompts), 2, 6), y_vec=torch.ones(len(prompts), 5))


def test_both_halves_of_an_encoder_are_asked_once(network: MMDiTModel) -> None:
    encoder = Counting()
    halves = TextPart(encoder, "txt"), TextPart(encoder, "y_vec")
    models = (network, ToyAutoencoder(torch.randn(4, 3)), *halves)
    prepare_api(*models, OptionalModels())(OPTION, text=["a"])
    assert encoder.calls == [["a"], [""]]
    with pytest.raises(UserError, match=r"^optional_models: must be the last of what prepare_models gave"):
        prepare_api(*models, {})
    assert halves[0](["a", "b"]).shape == (2, 2, 6) and halves[1](["a"]).shape == (1, 5)


def test_any_bad_batch_is_refused_in_a_line(network: MMDiTModel) -> None:
    """Seeded: entries of every sort; what is not refused gives pixels."""
    rng, api_fn = random.Random(5), api_of(network)
    values: list[Any] = [
        None,
        "",
        "a",
        [],
        ["a"],
        ["a", "b"],
        3,
        {"a": 1},
        [None],
        [["a"]],
        torch.zeros(2),
        b"a",
        [1.5],
    ]
    refused = 0
    for _ in range(300):
        batch = {key: rng.choice(values) for key in rng.sample(["text", "neg", "ref", "name", "index", "txet"], 3)}
        try:
            x = api_fn(OPTION, rng.choice(["t2v", "i2v_head", "v2v_tail", ""]), **batch)
            assert x.shape[1:] == (3, 3, 32, 32)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            refused += 1
    assert 200 < refused < 300
