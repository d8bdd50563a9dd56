"""One token for every row of logits: its distribution, what the settings leave, and what a draw depends on."""

from types import SimpleNamespace

import pytest
import torch

from prefpipe.engines.drawing import draw

PLAIN = SimpleNamespace(top_p=1.0, top_k=0, min_p=0.0)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_of(
    probabilities: list[float], temperature: float, top_p: float, number: int, *, top_k: int = 0, min_p: float = 0.0
) -> torch.Tensor:
    """Shares of the tokens in `number` draws."""
    settings = SimpleNamespace(top_p=top_p, top_k=top_k, min_p=min_p)
    random = source(0)
    logits = torch.tensor(probabilities).log().unsqueeze(0)
    found = torch.tensor([draw(logits.clone(), [temperature], [random], settings)[0] for _ in range(number)])
    return found.bincount(minlength=len(probabilities)) / number


def test_top_p_keeps_the_nucleus_only() -> None:
    """0.5 + 0.3 reach 0.7 with the token that crosses it; renormalised that is 5/8 and 3/8.

    4000 draws: the standard deviation of a share is below 0.008, so 0.04 are five of them.
    """
    shares = draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 0.7, 4000)
    assert shares[[0, 2]].tolist() == [0, 0]
    assert shares[[1, 3]].tolist() == pytest.approx([5 / 8, 3 / 8], abs=0.04)


def test_top_k_keeps_the_likeliest_and_top_p_cuts_what_is_left() -> None:
    """The two best are 0.5 and 0.3, renormalised 5/8 and 3/8; of these 0.6 keeps the first alone, as in vLLM."""
    shares = draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 1.0, 4000, top_k=2)
    assert shares[[0, 2]].tolist() == [0, 0]
    assert shares[[1, 3]].tolist() == pytest.approx([5 / 8, 3 / 8], abs=0.04)
    assert draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 0.6, 100, top_k=2).tolist() == [0, 1, 0, 0]
    assert draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 1.0, 4000, top_k=99)[2] > 0.02


def test_min_p_drops_what_is_too_unlikely_beside_the_best() -> None:
    """0.5 * 0.5 = 0.25: 0.15 and 0.05 go. At temperature 1/2 shares are squared first: 0.09 < 0.25 * 0.5 goes too."""
    shares = draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 1.0, 4000, min_p=0.5)
    assert shares[[0, 2]].tolist() == [0, 0]
    assert shares[3] > 0.3
    assert draws_of([0.15, 0.5, 0.05, 0.3], 0.5, 1.0, 200, min_p=0.5).tolist() == [0, 1, 0, 0]


def test_without_top_p_every_token_has_its_share() -> None:
    assert draws_of([0.15, 0.5, 0.05, 0.3], 1.0, 1.0, 4000).tolist() == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.04)


def test_temperature_sharpens_before_top_p_cuts() -> None:
    """Temperature 1/2 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365; the first has 0.685, so 0.6 keeps it alone.

    At temperature 1 the first has 0.5 < 0.6 and the second is kept too.
    """
    assert draws_of([0.5, 0.3, 0.15, 0.05], 0.5, 0.6, 500).tolist() == [1, 0, 0, 0]
    assert draws_of([0.5, 0.3, 0.15, 0.05], 1.0, 0.6, 500)[1] > 0.2
    shares = draws_of([0.5, 0.3, 0.15, 0.05], 0.5, 1.0, 4000)
    assert shares.tolist() == pytest.approx([0.685, 0.2466, 0.0616, 0.0068], abs=0.04)


def test_greedy_takes_the_best_whatever_top_p_says() -> None:
    assert draws_of([0.1, 0.2, 0.7], 0.0, 0.01, 20).tolist() == [0, 0, 1]


def test_the_smallest_nucleus_is_the_best_token() -> None:
    assert draws_of([0.1, 0.2, 0.7], 1.0, 1e-6, 50).tolist() == [0, 0, 1]


@pytest.mark.parametrize("size", [3, 256, 700])
def test_tokens_of_every_block_are_drawn_by_their_probability(size: int) -> None:
    """20,000 draws from a vocabulary of one block, of a whole one and of three: chi-squared per token near 1.

    Probabilities 1 to 5 by turns, so that every expected count is above 9: the mean of (found - expected)^2 / expected
    over `size` tokens is 1 with a standard deviation of at most sqrt(2 / 3), and of 0.09 for 256.
    """
    weights = torch.arange(size).remainder(5).add(1).float()
    expected = 20_000 * weights / weights.sum()
    sources = [source(seed) for seed in range(100)]
    counts = torch.zeros(size)
    for _ in range(200):
        drawn = draw(weights.log().repeat(100, 1), [1.0] * 100, sources, PLAIN)
        counts += torch.tensor(drawn).bincount(minlength=size)
    assert float(((counts - expected) ** 2 / expected).mean()) < (4.5 if size == 3 else 1.45)


def test_a_draw_depends_on_its_row_and_its_source_alone() -> None:
    """Rows of other temperatures beside it change nothing, nor does their number; a greedy row takes no randomness."""
    torch.manual_seed(0)
    logits = torch.randn(4, 600) * 2
    heat = [1.0, 0.0, 0.7, 1.3]
    together = draw(logits.clone(), heat, [source(k) for k in range(4)], PLAIN)
    alone = [draw(logits[k : k + 1].clone(), heat[k : k + 1], [source(k)], PLAIN)[0] for k in range(4)]
    assert together == alone
    assert together[1] == int(logits[1].argmax())
    untouched = source(1)
    draw(logits.clone(), heat, [source(0), untouched, source(2), source(3)], PLAIN)
    assert torch.equal(untouched.get_state(), source(1).get_state())


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """1,000 draws from 5,000 tokens, with logits that differ by 1e-6: a token changes where two candidates tie to
    within that, one draw in some 100,000. A cumulative sum would change some in every thousand."""
    torch.manual_seed(0)
    logits = torch.randn(1000, 5000)
    noise = 1e-6 * torch.randn(1000, 5000)
    one, other = (
        draw(x, [1.0] * 1000, [source(k) for k in range(1000)], PLAIN) for x in (logits.clone(), logits + noise)
    )
    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 1


def test_a_nucleus_of_more_tokens_than_are_sorted_at_first_is_whole() -> None:
    """2,000 equal tokens, top_p 0.9: 1,800 of them stay, or 1,801 by rounding."""
    random = source(0)
    settings = SimpleNamespace(top_p=0.9, top_k=0, min_p=0.0)
    found = {token for _ in range(150) for token in draw(torch.zeros(100, 2000), [1.0] * 100, [random] * 100, settings)}
    assert 1750 < len(found) <= 1801
