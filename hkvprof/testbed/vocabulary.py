"""Words, special tokens and cell classes of the testbed.

The order of the vocabulary is the token ids of the shipped checkpoint: append only.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GLYPHS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Characters drawn in text images; O and I are left out because they look like 0 and 1."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (235, 200, 20),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "black": (20, 20, 20),
    "cyan": (30, 190, 210),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPE_NAMES = ("disc", "star", "square", "triangle", "cross", "ring", "diamond", "bar")
ROW_NAMES = "ABCDEFGH"
MAX_ROWS = MAX_COLUMNS = len(ROW_NAMES)
MAX_LABEL = 32

BLANK = 0
FIRST_ITEM = 1 + len(GLYPHS)
CELL_CLASSES = FIRST_ITEM + len(COLOUR_NAMES) * len(SHAPE_NAMES)
"""Class ids of cells: 0 is blank, then one id per glyph, then colour x shape."""

PAD = "<pad>"
END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = (
    PAD,
    "<unk>",
    "<|endoftext|>",
    START_OF_TURN,
    END_OF_TURN,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
_SENTENCE = (
    "user assistant system you are a helpful image read row column cell list what is at in of "
    "the on where how many count which has have colour color shape code for changed change "
    "between and to from none blank text grid needle key value find first last same different "
    "left right above below next with no yes answer question one two three "
    "most common any all images or more there"
)

VOCABULARY = (
    *SPECIAL_TOKENS,
    *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *".,:;?!-=>",
    *(f"#{label}" for label in range(1, MAX_LABEL + 1)),
    *COLOUR_NAMES,
    *SHAPE_NAMES,
    *_SENTENCE.split(),
)
VOCABULARY_SIZE = 192
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{% set ns = namespace(s='') %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for c in message['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c or 'image_url' in c %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TOKEN_PATTERN = r"#\d+|[a-z]+|."
_PLAIN_TOKEN = re.compile(r"#\d+|[a-z]+|\S")


def item_class(colour: int, shape: int) -> int:
    """Class id of a coloured shape, from the positions in COLOUR_NAMES and SHAPE_NAMES."""
    return FIRST_ITEM + colour * len(SHAPE_NAMES) + shape


def is_item(cell: int) -> bool:
    """Whether the class id is a coloured shape (not blank, not a glyph)."""
    return cell >= FIRST_ITEM


def is_glyph(cell: int) -> bool:
    """Whether the class id is a character."""
    return BLANK < cell < FIRST_ITEM


def colour_of(cell: int) -> int:
    """Position in COLOUR_NAMES of an item's colour."""
    return (cell - FIRST_ITEM) // len(SHAPE_NAMES)


def shape_of(cell: int) -> int:
    """Position in SHAPE_NAMES of an item's shape."""
    return (cell - FIRST_ITEM) % len(SHAPE_NAMES)


def cell_name(cell: int) -> str:
    """How replies name a cell: `none`, a character, or a colour and a shape."""
    if cell == BLANK:
        return "none"
    if is_glyph(cell):
        return GLYPHS[cell - 1]
    return f"{COLOUR_NAMES[colour_of(cell)]} {SHAPE_NAMES[shape_of(cell)]}"


def place_name(position: int, columns: int) -> str:
    """Row letter and column number of a position in row-major order, `B3`."""
    row, column = divmod(position, columns)
    return f"{ROW_NAMES[row]}{column + 1}"


@lru_cache(maxsize=65536)
def encode_text(text: str) -> tuple[int, ...]:
    """Token ids of plain text, equal to the shipped tokenizer's (tested)."""
    return tuple(TOKEN_IDS[token] for token in _PLAIN_TOKEN.findall(text))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the checkpoint; white space leaves no token."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = dict(TOKEN_IDS)
    ids.update({f"<extra_{index}>": index for index in range(len(VOCABULARY), VOCABULARY_SIZE)})
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(_TOKEN_PATTERN), "isolated"),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token="<unk>",
        eos_token=END_OF_TURN,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        padding_side="left",
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
