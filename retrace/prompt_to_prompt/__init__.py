"""Prompt-to-Prompt: edit a picture by editing its prompt (Hertz et al. 2023)."""

from ..core.prompt import Prompt, Word, parse_values, parse_words, read_prompt
from ..pictures.token_map import token_pictures
from .alignment import MODES, Mode, TokenMap, token_map
from .control import Controller, PromptToPrompt, Target, Window, plan
from .describe import describe_edit
from .local_blend import LocalBlend, WordMaps, local_blend
from .sample import sample_edit
from .word_masks import word_maps, word_mask

__all__ = [
    "MODES",
    "Controller",
    "LocalBlend",
    "Mode",
    "Prompt",
    "PromptToPrompt",
    "Target",
    "TokenMap",
    "Window",
    "Word",
    "WordMaps",
    "describe_edit",
    "local_blend",
    "parse_values",
    "parse_words",
    "plan",
    "read_prompt",
    "sample_edit",
    "token_map",
    "token_pictures",
    "word_maps",
    "word_mask",
]
