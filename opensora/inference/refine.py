"""Prompts written out by a language model, and how much moves in what they describe; off by default.

The main process asks, as answers differ from one time to the next. A prompt that gets no answer stays as it is.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from opensora.config.run import SampleConfig
from opensora.inference.opensora_1x.prompts import for_each_part
from opensora.inference.prompts import MAX_PROMPT, Job
from opensora.utils.chat import ChatError, Messages, RefineConfig, ask, key_of
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

AT_ONCE = 8  # questions that are open together
PROMPT_TOKENS, MOTION_TOKENS = 250, 100  # the longest answers, as published
USUAL_MOTION, MOST_MOTION = 4, 15
_MOTION = re.compile(r"\b([0-9]{1,2})\b")

_VIDEO = (
    "You turn a short idea into the caption of a video clip, in the style of captions that a video model was "
    "trained on. Keep everything that the idea says, its wording for names and numbers, and its language if it is "
    "English; translate it otherwise. Say who or what is seen, what it looks like, what it does from the beginning "
    "of the clip to its end, where it is, the light and the colours, and how the camera stands or moves. Describe "
    "one continuous shot of a few seconds, in the present tense, in plain sentences of about the length of the "
    "examples. No headings, no lists, no quotation marks around the whole, no comment: the caption alone."
)
_IMAGE = (
    "You turn a short idea into the caption of a picture, in the style of captions that an image model was trained "
    "on. Keep everything that the idea says; translate it to English if it is not. Say who or what is seen, what it"
    " looks like, where it is, the light, the colours, the point of view and the style. Nothing moves, and nothing "
    "happens before or after. Plain sentences of about the length of the examples, and nothing but the caption."
)
_MOTION_ASKED = (
    "You estimate how much moves in a video clip from its caption. 1 is a clip in which almost nothing moves, 4 a "
    "calm one, 8 one with people or animals in motion, 15 one in which everything moves fast. Answer with the words"
    " 'N motion score', N being a whole number from 1 to 15, and nothing else."
)
Examples = tuple[tuple[str, str], ...]
_VIDEO_EXAMPLES: Examples = (
    (
        "a dog on a beach",
        "A young golden retriever runs along the edge of the water on a wide, empty beach in the early morning. Its"
        " wet fur shines in the low sun, and drops fly up wherever its paws meet the shallow waves. It turns in a "
        "tight circle, stops, shakes itself and looks back towards the camera with its ears up. The camera stays "
        "low above the sand and follows the dog from the side. The sky is pale orange, and the sea is calm and grey"
        " behind it.",
    ),
    (
        "old man repairs a clock",
        "An old man with round glasses and a grey apron bends over an open clock on a wooden workbench. With thin "
        "tweezers he lifts a small brass wheel, holds it to the light of a desk lamp and sets it carefully into the"
        " movement, which begins to turn. Tools, screws and a cup of tea stand around his hands, and the walls "
        "behind him are covered with clocks in soft shadow. The camera moves slowly closer, from his face to the "
        "turning wheels.",
    ),
    (
        "rainy city street at night, neon",
        "Rain falls on a narrow street of a large city at night. Red and blue neon signs are mirrored in the wet "
        "asphalt, and steam rises from a grating in the foreground. A woman under a transparent umbrella walks away"
        " from the camera, past lit shop windows, while a yellow taxi passes slowly from right to left and its "
        "lights sweep over the walls. The camera glides forward behind her at the height of her shoulders.",
    ),
)
_IMAGE_EXAMPLES: Examples = (
    (
        "a fox in the snow",
        "A red fox sits in deep, fresh snow at the edge of a pine forest and looks straight at the viewer. Its "
        "thick fur is bright against the white ground, and a few flakes lie on its back. The low winter sun lights "
        "it from the left and throws long blue shadows. Photograph at eye level with a softly blurred background.",
    ),
    (
        "a kitchen, watercolour",
        "A small country kitchen with a blue stove, copper pans on the wall and a bowl of lemons on a scrubbed "
        "wooden table. Morning light falls through an open window with white curtains. Loose watercolour on rough "
        "paper, with pale washes, visible pencil lines and white edges.",
    ),
    (
        "portrait of an astronaut",
        "Portrait of an astronaut in a worn white suit, the helmet under her arm, her short dark hair damp with "
        "sweat. She looks past the viewer with a tired smile. Behind her the grey wall of a hangar is out of focus."
        " Soft light from above, muted colours, a close view from the chest up.",
    ),
)
_MOTION_EXAMPLES: Examples = (
    ("A vase of flowers stands on a table by the window.", "1 motion score"),
    ("A woman walks through a park and talks on the telephone.", "5 motion score"),
    ("Motorcycles race around a muddy corner and throw up dirt, and the camera races along.", "14 motion score"),
)


def refined(cfg: SampleConfig, jobs: Sequence[Job]) -> tuple[list[Job], dict[int, int]]:
    """The jobs with their prompts rewritten where ``cfg.refine.prompts`` is true, and by the number of its prompt how
    much moves in each where ``cfg.refine.motion_score`` is true. Collective."""
    if not asks(cfg):
        return list(jobs), {}
    answers: list[Any] = [None]
    if dist.get_rank() == 0:
        answers[0] = _answers(cfg, {job.row: job.text for job in jobs})
    dist.broadcast_object_list(answers)
    texts, motions = answers[0]
    return [replace(job, text=texts[job.row]) for job in jobs], motions


def asks(cfg: SampleConfig) -> bool:
    """Whether a language model is asked at all."""
    return cfg.refine.prompts or cfg.refine.motion_score


def check_refine(cfg: SampleConfig, *, tells_motion: bool) -> None:
    """That there is a key, where a language model is asked, and a use for its answer.

    Args:
        tells_motion: prompts name a motion score.

    Raises:
        UserError: there is none.
    """
    if cfg.refine.motion_score and not tells_motion:
        raise UserError("refine.motion_score=true: prompts name no motion score; set prompt_suffix=true, or false here")
    if asks(cfg):
        key_of(cfg.refine)


def _answers(cfg: SampleConfig, texts: dict[int, str]) -> tuple[dict[int, str], dict[int, int]]:
    """(prompts, motion scores) by the number of the prompt; one question for equal prompts."""
    distinct = list(dict.fromkeys(texts.values()))
    motions: dict[str, int] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        written = {text: text for text in distinct}
        if cfg.refine.prompts:
            is_video = cfg.sampling.num_frames > 1 and cfg.cond_type == "t2v"
            change = partial(rewritten, cfg.refine, is_video=is_video)
            # Prompts of clips that go on from one another have a part for each.
            rule = partial(for_each_part, change=change) if cfg.goes_on else change
            found = pool.map(rule, distinct)
            written = dict(zip(distinct, found, strict=True))
        if cfg.refine.motion_score:
            scores = pool.map(lambda text: motion_of(cfg.refine, written[text]), distinct)
            motions = dict(zip(distinct, scores, strict=True))
    scored = {row: motions[text] for row, text in texts.items()} if motions else {}
    return {row: written[text] for row, text in texts.items()}, scored


def rewritten(cfg: RefineConfig, text: str, *, is_video: bool) -> str:
    """A prompt in the style of captions; itself where there is no answer."""
    instruction, examples = (_VIDEO, _VIDEO_EXAMPLES) if is_video else (_IMAGE, _IMAGE_EXAMPLES)
    try:
        return ask(cfg, _messages(instruction, examples, text), PROMPT_TOKENS)[:MAX_PROMPT]
    except ChatError as error:
        announce(f"refine.url={cfg.url}: {error}; the prompt {short(repr(text), 40)} stays as it is")
        return text


def motion_of(cfg: RefineConfig, text: str) -> int:
    """1 to 15; 4 where there is no answer."""
    try:
        answer = ask(cfg, _messages(_MOTION_ASKED, _MOTION_EXAMPLES, text), MOTION_TOKENS)
        found = _MOTION.search(answer)
        if found is None:
            raise ChatError(f"no motion score in {short(repr(answer), 40)}")
    except ChatError as error:
        announce(f"refine.url={cfg.url}: {error}; the motion score of {short(repr(text), 40)} is {USUAL_MOTION}")
        return USUAL_MOTION
    return min(max(int(found[1]), 1), MOST_MOTION)


def _messages(instruction: str, examples: Examples, text: str) -> Messages:
    pairs = [message for asked, answered in examples for message in (("user", asked), ("assistant", answered))]
    return [("system", instruction), *pairs, ("user", text)]
