"""Prompts with pictures in them: templates, chats, and what the language model is given to read.

Agrees with MiniGPT-4 ``minigpt_base.py`` (``get_context_emb``, ``prompt_wrap``), ``conversation.py`` (``Chat``)
and, for InstructBLIP, LAVIS ``blip2_vicuna_instruct.py``. The text between pictures is tokenised piece by
piece; a picture then takes ``tokens_per_image`` positions. Models never tokenise: they are given ids and slots.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mgpt4_jax.data.text import Tokenizer, require_encodable
from mgpt4_jax.data.text_lm import FramedTokenizer
from mgpt4_jax.errors import UserError

IMAGE = "<ImageHere>"
MARKED_IMAGE = f"<Img>{IMAGE}</Img>"
MAX_PROMPT_BYTES = 1_000_000

Message = tuple[Literal["user", "assistant"], str]
"""Who says what; a conversation is a tuple of them."""


@dataclass(frozen=True)
class Template:
    """How a family of language models was taught to tell the speakers apart.

    A chat is ``system``, then for each message its role's prefix, the text and its role's end; ``cue`` asks for
    an answer. ``training`` wraps an instruction when training, where upstream gives no system prompt.
    """

    name: str
    system: str = ""
    user: str = ""
    user_end: str = ""
    assistant: str = ""
    assistant_end: str = ""
    cue: str = ""
    training: str = "{}"
    end_symbol: str = "</s>"  # what an answer ends with in training
    stops: tuple[str, ...] = ("</s>",)  # an answer is cut before these
    answer_marks: tuple[str, ...] = ()  # and begins after the last of these
    reserved: tuple[str, ...] = ()  # a user's text may not hold them: they would forge a turn or a picture
    images_first: bool = False  # pictures before the beginning-of-sequence token, not within the text

    @property
    def is_plain(self) -> bool:
        """Whether text is given to the model as it is."""
        return not self.reserved


_IMAGE_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)
_RESERVED = ("<s>", "</s>", "<Img>", "</Img>", IMAGE)

VICUNA_V0 = Template(
    name="vicuna_v0",
    system=_IMAGE_SYSTEM + "###",
    user="Human: ",
    user_end="###",
    assistant="Assistant: ",
    assistant_end="###",
    cue="Assistant: ",
    training="###Human: {} ###Assistant: ",  # a space before ###Assistant, which the chat has not
    end_symbol="###",
    stops=("###",),
    answer_marks=("Assistant:",),
    reserved=("###", *_RESERVED),
)
VICUNA_V1 = Template(  # v1.1, v1.3, v1.5
    name="vicuna_v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user="USER: ",
    user_end=" ",
    assistant="ASSISTANT: ",
    assistant_end="</s>",
    cue="ASSISTANT:",  # an answer brings its own leading space
    training="USER: {} ASSISTANT:",
    answer_marks=("ASSISTANT:",),
    reserved=("USER:", "ASSISTANT:", *_RESERVED),
)
_INST = Template(
    name="minigpt_v2",
    user="<s>[INST] ",
    assistant=" [/INST] ",
    cue=" [/INST] ",
    training="[INST] {} [/INST]",
    answer_marks=("[/INST]",),
    reserved=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", *_RESERVED),
)
MINIGPT_V2 = dataclasses.replace(_INST, assistant=" [/INST]", cue=" [/INST]")
LLAMA2 = dataclasses.replace(_INST, name="llama2", system=_IMAGE_SYSTEM, training="[INST] {} [/INST] ")
INSTRUCTBLIP = Template(
    name="instructblip", user_end="\n", assistant_end="\n", reserved=("<s>", "</s>", IMAGE), images_first=True
)
BLIP2 = Template(  # on OPT and T5, whose tokenisers say what stands around a text
    name="blip2",
    user_end="\n",
    assistant_end="\n",
    end_symbol="\n",
    stops=(),
    reserved=("</s>", IMAGE),
    images_first=True,
)
NONE = Template(name="none")

TEMPLATES = {
    template.name: template for template in (VICUNA_V0, VICUNA_V1, LLAMA2, MINIGPT_V2, INSTRUCTBLIP, BLIP2, NONE)
}


def get_template(name: str) -> Template:
    """The template called ``name``; an unknown name raises ``UserError`` with the known ones."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the language model reads before it answers."""

    ids: np.ndarray  # int32 [t]; the pad id where a picture is
    slots: np.ndarray  # int32 [t]; -1 for text, else image index * tokens_per_image + token of that image
    num_images: int

    def __len__(self) -> int:
        return len(self.ids)


def build_prompt(
    tokenizer: Tokenizer,
    text: str,
    *,
    num_images: int,
    tokens_per_image: int,
    images_first: bool = False,
    add_bos: bool = True,
) -> Prompt:
    """Tokenise a whole prompt, its ``<ImageHere>`` placeholders turned into image slots.

    Each stretch of text is tokenised by itself, and only the first gets the beginning-of-sequence id, or of OPT and T5
    what their models expect around a text.
    With ``images_first`` the pictures stand before that id and ``text`` has no placeholders.

    Raises:
      UserError: there are not as many placeholders as pictures.
    """
    if num_images and not tokens_per_image:
        raise UserError(f"this model reads no pictures, but {_count(num_images, 'picture')} came with the prompt")
    if images_first:
        if IMAGE in text:
            raise UserError(f"this model reads its pictures before the text; remove {IMAGE} from the prompt")
        if isinstance(tokenizer, FramedTokenizer) and add_bos:
            text_ids = tokenizer.encode_whole(text)
        else:
            text_ids = tokenizer.encode(text, add_bos=add_bos)
        parts: list[Sequence[int] | int] = [*range(num_images), text_ids]
    else:
        segments = text.split(IMAGE)
        if len(segments) - 1 != num_images:
            raise UserError(
                f"the prompt has {len(segments) - 1} {IMAGE} but {_count(num_images, 'picture')}; "
                f"write one {IMAGE} for each picture, or none to put the pictures first"
            )
        parts = [tokenizer.encode(segments[0], add_bos=add_bos)]
        for image, segment in enumerate(segments[1:]):
            parts += [image, tokenizer.encode(segment)]
    ids, slots = _lay_out(parts, tokens_per_image, tokenizer.pad_id)
    return Prompt(ids, slots, num_images)


def format_prompt(template: Template, text: str, num_images: int, *, special_tokens: Sequence[str] = ()) -> str:
    """One question in its template, as a chat with a single message; pictures without a placeholder go in front.

    Args:
      special_tokens: the tokeniser's, which a templated prompt may not hold either.
    """
    check_user_text(text, template, special_tokens=special_tokens, num_images=num_images)
    if num_images and IMAGE not in text and not template.images_first:
        text = f"{MARKED_IMAGE} " * num_images + text
    return chat_prompt(template, (("user", text),))


def prepare_prompt(
    tokenizer: Tokenizer, template: Template, text: str, *, num_images: int, tokens_per_image: int
) -> Prompt:
    """``format_prompt`` and ``build_prompt``: from a user's question to ids and slots."""
    whole = format_prompt(template, text, num_images, special_tokens=tokenizer.special_tokens)
    return build_prompt(
        tokenizer,
        whole,
        num_images=num_images,
        tokens_per_image=tokens_per_image,
        images_first=template.images_first,
    )


def chat_prompt(template: Template, messages: Sequence[Message]) -> str:
    """The text of a conversation; if the user spoke last, ``template.cue`` asks for the answer."""
    text = template.system
    for role, message in messages:
        if role == "user":
            text += template.user + message + template.user_end
        else:
            text += template.assistant + message + template.assistant_end
    if messages and messages[-1][0] == "user":
        # INSTRUCTBLIP and NONE have no cue, and a last line break would be one more token to read.
        text = text + template.cue if template.cue else text.removesuffix(template.user_end)
    return text


def add_image(messages: tuple[Message, ...], template: Template) -> tuple[Message, ...]:
    """The conversation after a picture was shown: a message of its own, as in MiniGPT-4's ``upload_img``."""
    return messages if template.images_first else (*messages, ("user", MARKED_IMAGE))


def add_question(
    messages: tuple[Message, ...], text: str, template: Template, *, special_tokens: Sequence[str] = ()
) -> tuple[Message, ...]:
    """The conversation after the user asked ``text``; a picture just shown shares its message."""
    has_image = bool(messages) and messages[-1][0] == "user" and messages[-1][1].endswith("</Img>")
    check_user_text(text, template, special_tokens=special_tokens)
    if not text.strip() and not has_image:
        raise UserError("the question is empty; write one, or show a picture first")
    if has_image:
        return (*messages[:-1], ("user", f"{messages[-1][1]} {text}"))
    return (*messages, ("user", text))


def add_answer(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The conversation after the model answered. A placeholder that it wrote itself stands for no picture: it goes."""
    return (*messages, ("assistant", text.replace(IMAGE, "")))


def clean_answer(template: Template, text: str) -> str:
    """The answer within generated text: cut at the stops, begun after the cue, blanks stripped."""
    for stop in template.stops:
        text = text.split(stop)[0]
    for mark in template.answer_marks:
        text = text.split(mark)[-1]
    return text.replace("<s>", "").strip()


def stop_sequences(template: Template, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences that end an answer: each stop alone and after a letter ("▁###" and "##", "#" in Vicuna)."""
    found: dict[tuple[int, ...], None] = {}
    letter = tokenizer.encode("a")
    for stop in template.stops:
        found[tuple(tokenizer.encode(stop))] = None
        after = tokenizer.encode("a" + stop)
        if after[: len(letter)] == letter:
            found[tuple(after[len(letter) :])] = None
    return tuple(found)


def check_user_text(
    text: str, template: Template, *, special_tokens: Sequence[str] = (), num_images: int | None = None
) -> None:
    """Refuse text that is no question, or that would forge a turn, a picture or a special token.

    Args:
      num_images: pictures that come with the text, whose placeholders it may hold; None within a chat, where
        pictures are shown by themselves.
    """
    require_encodable(text)
    if "\0" in text:
        raise UserError("the prompt holds a NUL character; remove it")
    if len(text.encode("utf-8")) > MAX_PROMPT_BYTES:
        raise UserError(f"the prompt is over {MAX_PROMPT_BYTES:,} bytes; shorten it")
    if num_images == 0 and not text.strip():
        raise UserError("the prompt is empty and no picture came with it; write a question")
    if template.is_plain:
        return
    if template.images_first and IMAGE in text:
        raise UserError(f"this model reads its pictures before the text; remove {IMAGE} from the prompt")
    if num_images:
        text = re.sub(f"{re.escape(MARKED_IMAGE)}|{re.escape(IMAGE)}", " ", text)
    elif num_images == 0 and IMAGE in text:
        raise UserError(f"the prompt has {text.count(IMAGE)} {IMAGE} but no picture; give the pictures, or remove it")
    if found := next((token for token in (*template.reserved, *special_tokens) if token in text), None):
        raise UserError(
            f"the text holds {found!r}, which the template {template.name!r} reserves; "
            "remove it, or use the template 'none' to feed text as it is"
        )


def fit_prompt(prompt: Prompt, *, max_positions: int, max_new_tokens: int) -> Prompt:
    """``prompt`` itself if it and its answer fit the model; else ``UserError`` with the figures. Nothing is cut."""
    if len(prompt) + max_new_tokens <= max_positions:
        return prompt
    images = int(np.count_nonzero(prompt.slots >= 0))
    raise UserError(
        f"the prompt has {len(prompt)} tokens ({images} of them pictures) and asks for {max_new_tokens} new ones, but "
        f"the model holds {max_positions}; shorten the prompt or set max_new_tokens to at most "
        f"{max(max_positions - len(prompt), 0)}"
    )


def crop_left(prompt: Prompt, length: int) -> Prompt:
    """The last ``length`` positions, as upstream's chat crops: it may lose the first token and parts of pictures."""
    start = max(len(prompt) - length, 0)
    return dataclasses.replace(prompt, ids=prompt.ids[start:], slots=prompt.slots[start:])


def _lay_out(parts: Sequence[Sequence[int] | int], tokens_per_image: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and slots of a mix of token lists and picture numbers."""
    ids: list[int] = []
    slots: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += [fill] * tokens_per_image
            slots += range(part * tokens_per_image, (part + 1) * tokens_per_image)
        else:
            ids += part
            slots += [-1] * len(part)
    return np.array(ids, np.int32), np.array(slots, np.int32)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
