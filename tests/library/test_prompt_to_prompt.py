"""Prompt-to-Prompt without a model: which map goes where, when, and what a local blend leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retrace import prompt_to_prompt as p2p
from retrace.core.errors import InvalidInput, InvalidSetting, RetraceError
from retrace.core.host import AttentionCall, Parametrisation, Row
from retrace.core.prompt import Prompt, parse_word_lists, parse_words, read_prompt
from retrace.core.sampling import SampleStep
from retrace.pictures.token_map import token_pictures
from retrace.prompt_to_prompt.alignment import align
from retrace.prompt_to_prompt.control import attention_maps
from retrace.prompt_to_prompt.proximal import Proximal

pytestmark = pytest.mark.rounding

LENGTH = 77


def prompt(text: str, length: int = LENGTH) -> Prompt:
    """``|`` marks where CLIP would cut a word."""
    cut = [part.split("|") for part in text.split()]
    middle = [piece + ("</w>" if piece is word[-1] else "") for word in cut for piece in word]
    return read_prompt(text.replace("|", ""), [None, *middle, *[None] * (length - 1 - len(middle))])


def planned(source: str, *targets: str, **settings: Any) -> p2p.PromptToPrompt:
    return p2p.plan(prompt(source), [prompt(target) for target in targets], p2p.PlanSettings(**settings))


def attention(call: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def call(kind: str, rows: Sequence[Row], side: int = 4) -> AttentionCall:
    return AttentionCall(kind, "up.0", 0, side, side, tuple(rows), 1.0, F.scaled_dot_product_attention)  # type: ignore[arg-type]


def maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # type: ignore[no-any-return]


class TestAlignment:
    @pytest.mark.parametrize(
        ("source", "target", "substitute", "pairs"),
        [
            ("a cat", "a dog", True, [(0, 0), (1, 1)]),
            ("a cat", "a dog", False, [(0, 0)]),
            ("a cat", "a fluffy dog", True, [(0, 0), (1, 2)]),
            ("a red cat", "a cat", True, [(0, 0), (2, 1)]),
            ("", "a cat", True, []),
            ("a cat on a mat", "a dog on a mat in rain", True, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ],
    )
    def test_words_find_their_partners(
        self, source: str, target: str, substitute: bool, pairs: list[tuple[int, int]]
    ) -> None:
        assert align(source.split(), target.split(), substitute) == pairs

    def test_equal_prompts_share_everything(self) -> None:
        for mode in p2p.MODES:
            for pair in (p2p.token_map, p2p.reference_token_map):
                found = pair(prompt("a cat on sand"), prompt("a cat on sand"), mode)
                assert torch.equal(found.mapper, torch.eye(LENGTH))
                assert torch.equal(found.taken, torch.ones(LENGTH))

    def test_one_token_becomes_two_and_the_rest_moves_along(self) -> None:
        source, target = prompt("a cat on grass"), prompt("a chi|huahua on grass")
        mapper = p2p.token_map(source, target).mapper
        assert mapper[2, 2] == mapper[2, 3] == 0.5
        assert mapper[3, 4] == mapper[4, 5] == 1  # on, grass
        assert mapper[5, 6] == 1  # the end token
        assert torch.equal(mapper[:-1].sum(1), torch.ones(LENGTH - 1))  # what all get of a pixel is what there was

    def test_the_reference_loses_its_place_there(self) -> None:
        """Its mapper takes (j, j) behind the last changed word: 'on' gets the map of 'grass'."""
        source, target = prompt("a cat on grass"), prompt("a chi|huahua on grass")
        mapper = p2p.reference_token_map(source, target, "replace").mapper
        assert mapper[4, 4] == 1 and mapper[3].sum() == 0

    def test_new_words_keep_their_own_map(self) -> None:
        source, target = prompt("a cat on sand"), prompt("a silver cat statue on sand")
        for pair in (p2p.token_map, p2p.reference_token_map):
            found = pair(source, target, "refine")
            assert found.taken[:8].tolist() == [1, 1, 0, 1, 0, 1, 1, 1]
            assert found.mapper[2, 3] == found.mapper[4, 6] == 1

    def test_refine_does_not_put_one_word_in_the_place_of_another(self) -> None:
        found = p2p.token_map(prompt("a cat on sand"), prompt("a dog on sand"), "refine")
        assert found.taken[2] == 0 and found.taken[3] == 1

    def test_chunks_start_alike(self) -> None:
        pieces = [None, "cat</w>", *[None] * 75]
        source = read_prompt("cat", [*pieces, *[None] * 77])
        target = read_prompt("cat cat", [*pieces, *pieces])
        found = p2p.token_map(source, target)
        assert found.mapper[0, 0] == found.mapper[77, 77] == 1

    def test_the_reference_wants_equally_many_words(self) -> None:
        with pytest.raises(RetraceError, match=r"has 2 words and .* has 3"):
            p2p.reference_token_map(prompt("a cat"), prompt("a fat cat"), "replace")


class TestPlan:
    def test_windows_are_those_of_the_reference(self) -> None:
        """int(share * (steps + 1)) of its table: 0.8 of 50 are 40 steps, 0.4 are 20, 1 is all."""
        for share, steps in ((0.8, 40), (0.4, 20), (1.0, 50), (0.0, 0)):
            edit = planned("a cat", "a dog", cross_replace=(0.0, share))
            on = [bool(edit.targets[0].factors(i, 50)[0].any()) for i in range(50)]
            assert sum(on) == steps and all(on[:steps])

    def test_windows_may_start_later(self) -> None:
        """The maps of words between int(share * 51) of 50 steps, those of the layout between int(share * 50)."""
        edit = planned("a cat on sand", "a dog on sand", cross_replace=(0.2, 0.6), word_windows={"dog": (0.5, 1.0)})
        on = torch.stack([edit.targets[0].factors(i, 50)[0] for i in range(50)]) > 0
        assert on[:, 3].nonzero().flatten().tolist() == list(range(10, 30))
        assert on[:, 2].nonzero().flatten().tolist() == list(range(25, 50))
        text = p2p.describe_edit(edit)
        assert "dog in place of cat (50% to 100%)" in text and "sand (20% to 60%)" in text

    def test_a_word_has_a_window_of_its_own(self) -> None:
        edit = planned("a cat on sand", "a dog on sand", word_windows={"dog": (0.0, 0.2)})
        late, _ = edit.targets[0].factors(20, 50)
        assert late[2] == 0 and late[3] == 1

    def test_weights_fall_on_every_target_that_has_the_word(self) -> None:
        edit = planned("a cat", "a red cat", "a cat", weights={"red": -2.0})
        assert edit.targets[0].weights[2] == -2 and (edit.targets[1].weights == 1).all()

    @pytest.mark.parametrize("settings", [{"weights": {"dig": 2.0}}, {"word_windows": {"dig": (0.0, 1.0)}}])
    def test_a_word_that_is_nowhere_is_an_error(self, settings: dict[str, Any]) -> None:
        with pytest.raises(RetraceError, match=r"'dig' is not in the prompt 'a dog'.*'a', 'dog'"):
            planned("a cat", "a dog", **settings)

    def test_what_cannot_be(self) -> None:
        with pytest.raises(RetraceError, match="at least one target"):
            p2p.plan(prompt("a cat"), [])
        for name in ("cross_replace", "self_replace"):
            for window in ((0.5, 0.2), (-0.1, 0.2), (0.0, 1.1), (0.0, float("nan"))):
                with pytest.raises(InvalidSetting, match="between 0 and 1"):
                    planned("a cat", "a dog", **{name: window})
        with pytest.raises(InvalidSetting, match="between 0 and 1"):
            planned("a cat", "a dog", word_windows={"dog": (0.0, 2.0)})
        with pytest.raises(InvalidSetting, match="finite"):
            planned("a cat", "a dog", weights={"dog": float("nan")})

    def test_the_report_says_who_takes_whose_place(self) -> None:
        edit = planned("a red cat", "a blue cat there", weights={"blue": 2.0})
        text = p2p.describe_edit(edit)
        assert "blue in place of red, weight 2 (0% to 80%)" in text and "there: new" in text
        assert "gone: red" in p2p.describe_edit(planned("a red cat", "a cat"))


class TestTokenPicture:
    def test_a_swap_is_dark_a_new_word_orange_and_the_rest_empty(self) -> None:
        (picture,) = token_pictures(planned("a cat", "a big dog"))
        height, width, _ = picture.shape
        # Cells of 32 px, two rows and three columns, in the lower right corner, 12 px from the border.
        middles = [[picture[height - 12 - 48 + 32 * i, width - 12 - 80 + 32 * j] for j in range(3)] for i in range(2)]
        blue = [[bool(cell[2] - cell[0] > 0.3) for cell in row] for row in middles]
        orange = [[bool(cell[0] - cell[2] > 0.3) for cell in row] for row in middles]
        assert blue == [[True, False, False], [False, False, True]]
        assert orange == [[False, True, False]] * 2

    def test_tables_of_several_targets_are_of_one_size(self) -> None:
        pictures = token_pictures(planned("a cat", "a dog", "a very very old chi|hua|hua"))
        assert pictures.shape[0] == 2 and pictures.shape[3] == 3
        assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1


class TestController:
    ROWS = (Row(0, 0), Row(0, 1), Row(1, 0), Row(1, 1))

    def run(self, edit: Any, kind: str, step: int, keys: int, rows: Sequence[Row] | None = None) -> Any:
        generator = torch.Generator().manual_seed(0)
        rows = rows or self.ROWS
        q = torch.randn(len(rows), 2, 16, 8, generator=generator)
        k, v = (torch.randn(len(rows), 2, keys, 8, generator=generator) for _ in range(2))
        controller = edit.start(50)
        controller.enter(step)
        return controller(call(kind, rows), q, k, v), q, k, v

    def test_a_target_gets_the_maps_of_the_source_through_the_mapper(self) -> None:
        edit = planned("a cat on sand", "a dog on sand now")
        out, q, k, v = self.run(edit, "cross", 0, LENGTH)
        own = maps(q, k)
        tokens = edit.targets[0].tokens
        expected = own[0] @ tokens.mapper * tokens.taken + own[1] * (1 - tokens.taken)
        torch.testing.assert_close(out[1], expected @ v[1], rtol=1e-5, atol=1e-5)
        for untouched in (0, 2, 3):
            torch.testing.assert_close(out[untouched], own[untouched] @ v[untouched], rtol=1e-5, atol=1e-5)

    def test_maps_in_half_precision_do_not_overflow(self) -> None:
        """As large as the queries and keys of SD2.x get: their products are beyond the 65504 of fp16."""
        q, k = torch.full((1, 1, 4, 64), 60.0), torch.full((1, 1, 3, 64), 60.0)
        k[..., 1, :] = 59.9
        got = attention_maps(q.half(), k.half())
        torch.testing.assert_close(got, maps(q, k.half().float()), rtol=1e-4, atol=1e-6)

    def test_the_order_of_the_rows_does_not_matter(self) -> None:
        edit = planned("a cat", "a dog")
        rows = [Row(1, 0), Row(1, 1), Row(0, 0), Row(0, 1)]
        out, q, k, v = self.run(edit, "cross", 0, LENGTH, rows)
        torch.testing.assert_close(out[3], maps(q, k)[2] @ v[3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[1], maps(q, k)[1] @ v[1], rtol=1e-5, atol=1e-5)

    def test_weights_multiply_the_map_of_old_and_new_words(self) -> None:
        edit = planned("a cat", "a cat asleep", mode="refine", weights={"cat": -3.0, "asleep": 2.0})
        out, q, k, v = self.run(edit, "cross", 39, LENGTH)
        own = maps(q, k)
        expected = own[0] @ edit.targets[0].tokens.mapper
        expected[..., 2] *= -3
        expected[..., 3] = 2 * own[1][..., 3]
        torch.testing.assert_close(out[1], expected @ v[1], rtol=1e-5, atol=1e-5)
        later, q, k, v = self.run(edit, "cross", 40, LENGTH)
        torch.testing.assert_close(later[1], maps(q, k)[1] @ v[1], rtol=1e-5, atol=1e-5)

    def test_self_attention_has_the_layout_of_the_source_and_its_own_values(self) -> None:
        edit = planned("a cat", "a dog", self_replace=(0.0, 0.4))
        out, q, k, v = self.run(edit, "self", 19, 16)
        torch.testing.assert_close(out[1], maps(q, k)[0] @ v[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[3], maps(q, k)[3] @ v[3], rtol=1e-5, atol=1e-5)
        later, q, k, v = self.run(edit, "self", 20, 16)
        torch.testing.assert_close(later[1], maps(q, k)[1] @ v[1], rtol=1e-5, atol=1e-5)

    def test_the_layout_may_be_free_at_first(self) -> None:
        edit = planned("a cat", "a dog", self_replace=(0.2, 0.6))
        for step, whose in ((9, 1), (10, 0), (29, 0), (30, 1)):
            out, q, k, v = self.run(edit, "self", step, 16)
            torch.testing.assert_close(out[1], maps(q, k)[whose] @ v[1], rtol=1e-5, atol=1e-5)

    def test_the_words_may_be_free_at_first(self) -> None:
        edit = planned("a cat", "a dog", cross_replace=(0.2, 0.6))
        for step, whose in ((9, 1), (10, 0), (29, 0), (30, 1)):
            out, q, k, v = self.run(edit, "cross", step, LENGTH)
            torch.testing.assert_close(out[1], maps(q, k)[whose] @ v[1], rtol=1e-5, atol=1e-5)

    def test_other_conditions_may_be_the_edited_ones(self) -> None:
        edit = planned("a cat", "a dog")
        q, k, v = torch.randn(4, 2, 16, 8), torch.randn(4, 2, LENGTH, 8), torch.randn(4, 2, LENGTH, 8)
        for positive, edited in (((1,), {3}), ((), set()), ((0, 1), {1, 3})):
            controller = edit.start(50)
            controller.edits(positive)
            out = controller(call("cross", self.ROWS), q, k, v)
            own = F.scaled_dot_product_attention(q, k, v)
            assert {n for n in range(4) if not torch.allclose(out[n], own[n], atol=1e-5)} == edited

    def test_large_layers_keep_their_own_self_attention(self) -> None:
        edit = planned("a cat", "a dog", self_limit=3)
        out, q, k, v = self.run(edit, "self", 0, 16)
        torch.testing.assert_close(out[1], maps(q, k)[1] @ v[1], rtol=1e-5, atol=1e-5)

    def test_what_other_patches_add_stays(self) -> None:
        edit = planned("a cat", "a dog")
        q, k, v = torch.randn(2, 2, 16, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
        rows = (Row(0, 0), Row(0, 1))
        plain = edit.start(50)(call("cross", list(rows)), q, k, v)
        patched = AttentionCall(
            "cross", "up.0", 0, 4, 4, rows, 1.0, lambda *a: F.scaled_dot_product_attention(*a) + 7.0
        )
        torch.testing.assert_close(edit.start(50)(patched, q, k, v), plain + 7, rtol=1e-5, atol=1e-5)

    def test_tokens_that_are_repeated_for_a_longer_negative_count_once(self) -> None:
        edit = planned("a cat", "a dog")
        q, k, v = torch.randn(2, 2, 16, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
        rows = [Row(0, 0), Row(0, 1)]
        once = edit.start(50)(call("cross", rows), q, k, v)
        twice = edit.start(50)(call("cross", rows), q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))
        torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5)

    def test_another_batch_is_an_error_that_says_what_is_needed(self) -> None:
        edit = planned("a cat", "a dog", "a hen")
        with pytest.raises(InvalidInput, match=r"has 3 prompts .* batch of 2.*one latent for each prompt"):
            self.run(edit, "cross", 0, LENGTH)

    def test_another_conditioning_is_an_error(self) -> None:
        edit = planned("a cat", "a dog")
        with pytest.raises(InvalidInput, match="attends to 154 tokens"):
            self.run(edit, "cross", 0, 154)


class TestLocalBlend:
    def recorded(self, words: str, subtract: str = "", **settings: Any) -> Any:
        """Source and target attend with token 2 to the left column, with token 4 to the upper row."""
        prompts = [prompt("a cat on sand"), prompt("a dog on sand")]
        asked = p2p.BlendWords(parse_word_lists(words), parse_words(subtract), **settings)
        blend = p2p.local_blend(prompts, asked)
        assert blend is not None
        kept = p2p.WordMaps(blend)
        seen = torch.zeros(2, 2, 256, LENGTH)
        seen.view(2, 2, 16, 16, LENGTH)[:, :, :, 0, 2] = 1.0
        seen.view(2, 2, 16, 16, LENGTH)[:, :, 0, :, 4] = 1.0
        kept.add(call("cross", [Row(0, 0), Row(0, 1)], 16), seen)
        return kept

    def test_the_mask_is_the_words_region_one_cell_wider(self) -> None:
        mask = self.recorded("cat, dog").mask(16, 16)
        expected = torch.zeros(16, 16)
        expected[:, :2] = 1  # 3 x 3 maximum
        assert torch.equal(mask[1, 0], expected)

    def test_words_to_keep_are_cut_out(self) -> None:
        mask = self.recorded("cat, dog", "sand").mask(16, 16)[1, 0]
        assert mask[0].sum() == 0 and mask[1:, :2].min() == 1

    def test_words_to_keep_have_a_threshold_of_their_own(self) -> None:
        """The row of 'sand' is at its maximum everywhere: no threshold below 1 spares it, and 1 cuts nothing out."""
        assert self.recorded("cat, dog", "sand", threshold=0.4).blend.subtract_threshold == 0.4
        cut, whole = (
            self.recorded("cat, dog", "sand", keep_threshold=share).mask(16, 16)[1, 0] for share in (0.9, 1.0)
        )
        assert cut[0].sum() == 0 and torch.equal(whole, self.recorded("cat, dog").mask(16, 16)[1, 0])
        with pytest.raises(InvalidSetting, match=r"subtract_threshold is 1\.1"):
            self.recorded("cat, dog", "sand", keep_threshold=1.1)

    def test_each_prompt_may_have_words_of_its_own(self) -> None:
        assert parse_word_lists("cat, dog") == ["cat", "dog"]
        assert parse_word_lists("cat, hen | dog") == [["cat", "hen"], ["dog"]]
        prompts = [prompt("a cat and a dog"), prompt("a dog and a cat")]
        for asked, words in (
            ("cat, dog", ((2, 5), (2, 5))),
            ("cat | dog", ((2,), (2,))),
            ("cat | cat", ((2,), (5,))),
            ("dog |", ((5,), ())),
            ("| dog", ((), (2,))),
        ):
            blend = p2p.local_blend(prompts, p2p.BlendWords(parse_word_lists(asked)))
            assert blend is not None and blend.words == words
        kept = p2p.local_blend(prompts, p2p.BlendWords(["cat"], parse_word_lists("dog | cat")))
        assert kept is not None and kept.subtract == ((5,), (5,))
        assert p2p.local_blend(prompts, p2p.BlendWords(parse_word_lists("|"))) is None
        with pytest.raises(RetraceError, match="words for 3 prompts, but there are 2"):
            p2p.local_blend(prompts, p2p.BlendWords(parse_word_lists("cat | dog | hen")))
        with pytest.raises(RetraceError, match="'hen' is not in the prompt 'a dog and a cat'"):
            p2p.local_blend(prompts, p2p.BlendWords(parse_word_lists("cat | hen")))

    def test_words_of_one_prompt_only_look_at_that_one(self) -> None:
        """The source attends to the left column with its 'cat'; of the target nothing is asked."""
        both, source, target = (self.recorded(words).mask(16, 16) for words in ("cat, dog", "cat |", "| sand"))
        assert torch.equal(source[1], both[1])
        expected = torch.zeros(16, 16)
        expected[:2] = 1
        assert torch.equal(target[1, 0], expected) and target[0].sum() == 0

    def test_it_grows_to_the_latent(self) -> None:
        mask = self.recorded("cat, dog").mask(64, 32)[1, 0]
        assert mask[:, :4].min() == 1 and mask[:, 4:].max() == 0

    def test_before_its_start_nothing_is_blended(self) -> None:
        kept, x = self.recorded("cat, dog"), torch.randn(2, 4, 16, 16)
        assert torch.equal(kept.blend_latents(x, 10, 50), x)
        after = kept.blend_latents(x, 11, 50)
        assert torch.equal(after[0], x[0])
        torch.testing.assert_close(after[1, :, :, 2:], x[0, :, :, 2:])
        torch.testing.assert_close(after[1, :, :, :2], x[1, :, :, :2])

    def test_words_that_are_nowhere(self) -> None:
        prompts = [prompt("a cat"), prompt("a dog")]
        assert p2p.local_blend(prompts, p2p.BlendWords()) is None
        with pytest.raises(RetraceError, match="'hen' is not in the prompt 'a cat'"):
            p2p.local_blend(prompts, p2p.BlendWords(["hen"]))
        with pytest.raises(RetraceError, match="none that may change"):
            p2p.local_blend(prompts, p2p.BlendWords([], ["cat"]))


@dataclass(frozen=True)
class Words:
    """Stands for the condition of a batch."""

    embedding: torch.Tensor

    def with_embedding(self, embedding: torch.Tensor) -> Words:
        return Words(embedding)


@dataclass
class Looking:
    """A model whose attention looks at ``columns[n]`` with the word at place 2, the n-th time it is replaced."""

    columns: Sequence[int]
    parametrisation: Parametrisation = "eps"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evaluations: int = 0
    looks: int = 0
    hook: Any = None
    steps: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def attention(self, hook: Any) -> Iterator[None]:
        self.hook = hook
        try:
            yield
        finally:
            self.hook = None

    def denoised(self, x: torch.Tensor, sigma: Any, cond: Any) -> torch.Tensor:
        self.evaluations += len(x)
        if self.hook is not None:
            k = torch.zeros(len(x), 1, LENGTH, 2)
            k[:, :, 2, 0] = 1000.0
            q = torch.zeros(len(x), 1, 16, 16, 2)
            q[:, :, :, self.columns[self.looks], 0] = 1.0
            self.looks += 1
            self.hook(call("cross", [Row(0, i) for i in range(len(x))], 16), q.flatten(2, 3), k, k)
        return x / 2 + torch.arange(len(x)).view(-1, 1, 1, 1)  # each image has an aim of its own

    def denoised_each(self, x: torch.Tensor, sigma: Any, conds: Sequence[Any]) -> list[torch.Tensor]:
        return [self.denoised(x, sigma, cond) for cond in conds]

    def differentiable(self, *, recompute: bool = False) -> Any:
        raise NotImplementedError

    def progress(self, step: int, total: int, denoised: Any = None) -> None:
        self.steps.append((step, total))


class TestSampling:
    LEVELS = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    WORDS = Words(torch.zeros(2, LENGTH, 4))

    def edit(self, **blend: Any) -> p2p.PromptToPrompt:
        prompts = [prompt("a cat on sand"), prompt("a dog on sand")]
        local = p2p.local_blend(prompts, p2p.BlendWords(**blend)) if blend else None
        return p2p.plan(prompts[0], prompts[1:], blend=local)

    def sampled(self, model: Looking, levels: torch.Tensor, options: p2p.EditSampling) -> torch.Tensor:
        noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        return p2p.sample_edit(model, noise, levels, self.WORDS, self.WORDS, 3.0, options)

    def test_a_closing_step_between_equal_levels_blends(self) -> None:
        """The reference looks there once more. Column 0 has half of the maximum before that look, a third after."""
        edit = self.edit(words=["cat", "dog"], threshold=0.4, start=0.0)
        model = Looking((0, 8, 8, 8))
        seen: list[SampleStep] = []
        out = self.sampled(model, self.LEVELS, p2p.EditSampling(edit, callback=seen.append))
        before = seen[2].x
        assert not torch.allclose(before[1, :, :, :2], before[0, :, :, :2])  # what column 0 said was still free
        assert torch.equal(out[0], before[0])
        torch.testing.assert_close(out[1, :, :, :7], out[0, :, :, :7])
        torch.testing.assert_close(out[1, :, :, 7:10], before[1, :, :, 7:10])
        assert not torch.allclose(out[1, :, :, 7:10], out[0, :, :, 7:10])
        assert model.looks == 4 and model.evaluations == 3 * (2 + 2) + 2  # guidance has nothing to do there
        assert [(done.step, done.sigma, done.sigma_next) for done in seen[2:]] == [(3, 2.0, 1.0), (4, 1.0, 1.0)]
        assert model.steps[-1] == (4, 4)

    def test_without_a_blend_a_closing_step_costs_nothing(self) -> None:
        model = Looking((0, 8, 8, 8))
        out = self.sampled(model, self.LEVELS, p2p.EditSampling(self.edit()))
        assert model.looks == 3 and model.evaluations == 3 * (2 + 2)
        short = self.sampled(Looking((0, 8, 8)), self.LEVELS[:-1], p2p.EditSampling(self.edit()))
        assert torch.equal(out, short)

    def test_a_callback_sees_every_step_and_may_replace_the_batch(self) -> None:
        seen: list[SampleStep] = []

        def flat(done: SampleStep) -> torch.Tensor:
            seen.append(done)
            return torch.zeros_like(done.x)

        out = self.sampled(Looking((0, 0, 0)), self.LEVELS[:-1], p2p.EditSampling(callback=flat))
        assert not out.any()
        assert [(done.step, done.total, done.sigma_next) for done in seen] == [(1, 3, 4.0), (2, 3, 2.0), (3, 3, 1.0)]

    def test_another_number_of_prompts(self) -> None:
        alone = Words(torch.zeros(1, LENGTH, 4))
        with pytest.raises(RetraceError, match="has 2 prompts, but the condition holds 1"):
            noise, options = torch.randn(1, 1, 16, 16), p2p.EditSampling(self.edit())
            p2p.sample_edit(Looking(()), noise, self.LEVELS, alone, alone, 3.0, options)


class TestProximal:
    def test_small_changes_vanish_and_large_ones_stay(self) -> None:
        change = torch.arange(1.0, 11.0).view(1, 1, 2, 5) * torch.tensor([1.0, -1, 1, -1, 1])
        hard = Proximal(0.7).shrink(change)
        assert hard.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, -9, 10]
        soft = Proximal(0.7, "soft").shrink(change)
        assert soft.flatten()[-2:].tolist() == [-1, 2]
        assert torch.equal(Proximal(0.0).shrink(change), change)

    def test_every_image_has_its_own_threshold(self) -> None:
        change = torch.stack([torch.arange(4.0), 100 * torch.arange(4.0)]).view(2, 1, 2, 2) + 1
        kept = Proximal(0.5).shrink(change)
        assert ((kept > 0).sum(dim=(1, 2, 3)) == 1).all()

    def test_settings(self) -> None:
        with pytest.raises(InvalidSetting, match="quantile"):
            Proximal(1.0)
        with pytest.raises(InvalidSetting, match="'l7'"):
            Proximal(0.5, "l7")  # type: ignore[arg-type]
