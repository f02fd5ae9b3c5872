"""``I2VDenoiser`` and ``DistilledDenoiser``: sampling of a model by the names of its own forward, for scripts.

The interface is that of Open-Sora 2. Guidance, solver and loop are those of ``sampling.loop.denoise``, which our own
commands call for every family of models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.models.conditions import Conditions
from opensora.sampling.evaluation import Watch, unwatched
from opensora.sampling.guidance import build_guidance
from opensora.sampling.loop import Progress, denoise
from opensora.sampling.options import SamplingMethod, SamplingOption
from opensora.schedulers.euler import Euler
from opensora.utils.tasks import TaskRunner, one_by_one
from opensora.utils.tokens import image_ids, pack

PASSES = 3  # that the batch of guidance by passes holds: (prompt, references), (negative, references), (negative)


class I2VDenoiser:
    """Classifier-free guidance by several passes, for prompts and for references; see sampling/guidance.py."""

    method: Literal["i2v", "distill"] = "i2v"

    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        timesteps: Sequence[float],
        guidance: float,
        *,
        guidance_img: float | None = None,
        masks: Tensor | None = None,
        masked_ref: Tensor | None = None,
        cond: Tensor | None = None,
        latent_frames: int | None = None,
        text_osci: bool = False,
        image_osci: bool = False,
        scale_temporal_osci: bool = False,
        patch_size: int = 2,
        flow_shift: float | None = None,
        sigma_min: float = 0.0,
        progress: Progress | None = None,
        run: TaskRunner = one_by_one,
        watch: Watch = unwatched,
        **inputs: Any,
    ) -> Tensor:
        """Tokens at the last of ``timesteps`` in fp32 (fp64 for fp64 img), (B, N, C).

        With ``guidance_img`` inputs are in three parts one after the other, as ``prepare_guidance`` puts the texts:
        those of the prompts, and twice those of the negative prompts; the third pass knows no reference. Without it
        there is one pass, and guidance is an input of the model alone.

        Args:
            model: called with img, timesteps (B,), guidance (B,) unless its ``cfg`` says that it reads none, cond if
                there is any, and ``inputs``.
            img: (3 B, N, C) noise, packed, of which the first part is used, or (B, N, C); N may be this process's share
                of the tokens.
            timesteps: falling times, see get_schedule.
            guidance, guidance_img: towards the prompt, and towards the references.
            masks, masked_ref: (B, 1, T', H', W') and (B, C, T', H', W'): 1 where latents are known, and these latents.
            cond: in place of both: packed, and cut as img is; something in it is known, on some process.
            latent_frames: T' of the whole clip, where neither masks nor all of its tokens are given.
            text_osci, image_osci, scale_temporal_osci: how guidance varies, see ``SamplingOption``.
            patch_size: latents along a side of a token.
            flow_shift, sigma_min: for callers that hand over all options; times are shifted already, and end at 0.
            progress: called after every step.
            run: evaluates the model for the passes of a step, which do not depend on each other.
            watch: entered around every evaluation, as by a step cache.
            inputs: the model's other arguments, as img_ids, txt, txt_ids and y_vec. Tensors in three parts are cut,
                all else is the same in every pass.

        Raises:
            ValueError: a batch that is not in three parts, or references for a model that reads none.
        """
        by_passes = guidance_img is not None and self.method == "i2v"
        clips = _clips(img, inputs) if by_passes else len(img)
        per_pass = _passes(inputs, clips) if by_passes else [inputs] * PASSES
        known, references = _known(masks, masked_ref, cond, patch_size)
        if references and not _reads(model, "cond"):
            raise ValueError("masked_ref: the model reads no reference frames (cond_embed=false); leave it out")
        option = SamplingOption(
            guidance=guidance if by_passes else 1.0,
            guidance_img=guidance_img if by_passes and guidance_img is not None else 1.0,
            text_osci=text_osci,
            image_osci=image_osci,
            scale_temporal_osci=scale_temporal_osci,
        )
        scale = torch.full((clips,), float(guidance), device=img.device)

        def predict(x: Tensor, t: Tensor, told: Conditions) -> Tensor:
            blind = known is not None and told.reference is None  # a pass that may not know the references
            given = dict(per_pass[-1] if blind else told.context)
            if known is not None and _reads(model, "cond"):
                given["cond"] = torch.zeros_like(known) if blind else known
            if _reads(model, "guidance"):
                given["guidance"] = scale
            return model(img=x, timesteps=t, **given)

        positions, frames = _positions(per_pass[0], masked_ref, img[:clips], patch_size)
        return denoise(
            predict,
            img[:clips],
            Euler(list(timesteps)),
            build_guidance(
                option,
                references=references and by_passes,
                steps=len(timesteps) - 1,
                latent_frames=latent_frames or frames,
                positions=positions,
            ),
            Conditions(reference=known, context=per_pass[0]),
            Conditions(context=per_pass[1]),
            progress=progress,
            run=run,
            watch=watch,
        )

    def prepare_guidance(
        self,
        text: Sequence[str],
        optional_models: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        neg: Sequence[str] | None = None,
        guidance_img: float = 3.0,
    ) -> tuple[list[str], dict[str, Any]]:
        """(the texts of all passes, what ``denoise`` needs besides); None for ``neg``: empty negative prompts."""
        negative = [""] * len(text) if neg is None else list(neg)
        return [*text, *negative, *negative], {"guidance_img": guidance_img}


class DistilledDenoiser(I2VDenoiser):
    """One pass per step; the model reads the guidance scale as an input (Flux-dev), and no negative prompt."""

    method = "distill"

    def prepare_guidance(self, text: Sequence[str], *_: Any, **__: Any) -> tuple[list[str], dict[str, Any]]:
        """The texts as they are."""
        return list(text), {}


DENOISERS: dict[str, type[I2VDenoiser]] = {"i2v": I2VDenoiser, "distill": DistilledDenoiser}
SamplingMethodDict = {SamplingMethod(name): denoiser() for name, denoiser in DENOISERS.items()}


def _clips(img: Tensor, inputs: Mapping[str, Any]) -> int:
    """B of a batch in three parts."""
    rows = {len(x) for x in inputs.values() if isinstance(x, Tensor) and x.ndim}
    clips = len(img) if rows == {PASSES * len(img)} else len(img) // PASSES
    if not clips or (clips != len(img) and len(img) % PASSES) or rows - {PASSES * clips}:
        raise ValueError(
            f"img has {len(img)} rows, other inputs {sorted(rows)}: with guidance_img all must be in three parts: "
            "of the prompts, and twice of the negative prompts (prepare_guidance)"
        )
    return clips


def _passes(inputs: Mapping[str, Any], clips: int) -> list[dict[str, Any]]:
    """What each pass is given; the parts of tensors that hold all of them."""

    def part(x: Any, number: int) -> Any:
        whole = isinstance(x, Tensor) and x.ndim and len(x) == PASSES * clips
        return x[number * clips : (number + 1) * clips] if whole else x

    return [{name: part(x, number) for name, x in inputs.items()} for number in range(PASSES)]


def _known(
    masks: Tensor | None, masked_ref: Tensor | None, cond: Tensor | None, patch_size: int
) -> tuple[Tensor | None, bool]:
    """(what the model is told of known latents, packed; whether any is known)."""
    if masks is None or masked_ref is None:
        return cond, cond is not None
    return pack(torch.cat((masks.to(masked_ref), masked_ref), dim=1), patch_size), bool(masks.any())


def _positions(
    inputs: Mapping[str, Any], masked_ref: Tensor | None, img: Tensor, patch_size: int
) -> tuple[Tensor, int]:
    """((B, N, 3): where the tokens are, as far as anybody says so; T' of the clip)."""
    ids = inputs.get("img_ids")
    if masked_ref is not None:
        grid = (masked_ref.shape[2], masked_ref.shape[3], masked_ref.shape[4])
        whole = image_ids(grid, patch_size, img.device).expand(len(img), -1, -1)
        return whole if ids is None else ids, grid[0]
    if ids is None:
        return torch.zeros(*img.shape[:2], 3, device=img.device), 1
    return ids, int(ids[..., 0].max()) + 1 if ids.numel() else 1


def _reads(model: Any, name: str) -> bool:
    """Whether a model takes an argument that not all of them do; one that does not say so takes it."""
    return bool(getattr(getattr(model, "cfg", None), f"{name}_embed", True))
