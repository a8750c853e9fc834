"""Prompt-to-Prompt: edit an image by editing its prompt (Hertz et al. 2023)."""

from .alignment import MODES, Mode, TokenMap, reference_token_map, token_map
from .control import Controller, PlanSettings, PromptToPrompt, Target, Window, plan
from .describe import describe_edit
from .local_blend import BlendWords, LocalBlend, WordMaps, local_blend
from .sample import EditSampling, sample_edit
from .word_masks import word_maps, word_mask

__all__ = [
    "MODES",
    "BlendWords",
    "Controller",
    "EditSampling",
    "LocalBlend",
    "Mode",
    "PlanSettings",
    "PromptToPrompt",
    "Target",
    "TokenMap",
    "Window",
    "WordMaps",
    "describe_edit",
    "local_blend",
    "plan",
    "reference_token_map",
    "sample_edit",
    "token_map",
    "word_maps",
    "word_mask",
]
