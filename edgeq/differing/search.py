"""A seeded search for prompts after which two sides part earliest.

From the given prompts on, words are swapped, deleted and inserted; of every eight mutations the
best of all so far are mutated next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeq.console import Progress
from edgeq.differing.comparing import Pair, first_difference
from edgeq.differing.prompts import Prompt
from edgeq.differing.results import Answer, Found
from edgeq.runtime.model import Tokens
from edgeq.texts.writing import N_SEQ, write

N_PARENTS = 8  # that are mutated further
N_REPORTED = 5
_TRIES = 100  # for a mutation that is new and fits

Encode = Callable[[Sequence[str]], list[Tokens]]


def badness(found: Found) -> tuple[int, float]:
    """Return what the search maximizes: an early difference, then the divergence."""
    never = found.first is None
    return (-(1 << 30) if never else -int(found.first or 0)), found.kld


def mutate(text: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """Swap two words of a text, delete one, or insert one of `words`."""
    own = text.split()
    kind = int(rng.integers(3)) if len(own) > 1 else 2
    if kind == 0:
        i, j = rng.choice(len(own), 2, replace=False).tolist()
        own[i], own[j] = own[j], own[i]
    elif kind == 1:
        del own[int(rng.integers(len(own)))]
    else:
        own.insert(int(rng.integers(len(own) + 1)), words[int(rng.integers(len(words)))])
    return " ".join(own)


@dataclass
class _Population:
    """Every prompt that was tried.

    Attributes
    ----------
    words : that are inserted
    seen : texts that are not tried again
    """

    words: list[str]
    rng: np.random.Generator
    tried: list[Found]
    seen: set[str] = field(default_factory=set)

    def best(self, n: int) -> list[Found]:
        """Return the worst prompts, the very worst first."""
        return sorted(self.tried, key=badness, reverse=True)[:n]

    def children(self, n: int, encode: Encode, longest: int) -> list[tuple[Prompt, Tokens]]:
        """Return up to `n` new mutations of the best prompts that are not too long."""
        parents = self.best(N_PARENTS)
        prompts: list[Prompt] = []
        for _ in range(_TRIES * n):
            parent = parents[int(self.rng.integers(len(parents)))].prompt
            text = mutate(parent.text, self.words, self.rng)
            if text not in self.seen:
                self.seen.add(text)
                prompts.append(Prompt(text, parent.label, parent.line))
            if len(prompts) == n:
                break
        tokens = encode([prompt.text for prompt in prompts]) if prompts else []
        pairs = zip(prompts, tokens, strict=True)
        return [(prompt, own) for prompt, own in pairs if 0 < len(own) <= longest]


def search(
    pair: Pair,
    answers: Sequence[Answer],
    n_evaluations: int,
    encode: Encode,
    progress: Progress | None = None,
) -> tuple[Found, ...]:
    """Return the prompts where two sides part earliest, and of equals diverge most.

    Parameters
    ----------
    answers : of the given prompts, which the search starts from
    n_evaluations : mutations that are tried
    encode : gives the tokens of texts
    """
    given = [Found(a.prompt, a.first[0.0], float(a.forced.kld.mean()), a.texts) for a in answers]
    population = _Population(
        words=list(dict.fromkeys(word for each in given for word in each.prompt.text.split())),
        rng=np.random.default_rng(pair.settings.seed),
        tried=given,
        seen={each.prompt.text for each in given},
    )
    n_done = 0
    while n_done < n_evaluations:
        n = min(N_SEQ, n_evaluations - n_done)
        children = population.children(n, encode, pair.longest)
        if not children:
            break  # of few words all mutations are known
        population.tried += _evaluate(pair, children)
        n_done += len(children)
        if progress is not None:
            progress(n_done, n_evaluations)
    return tuple(population.best(N_REPORTED))


def _evaluate(pair: Pair, children: Sequence[tuple[Prompt, Tokens]]) -> list[Found]:
    tokens = [each for _, each in children]
    n_tokens = pair.settings.n_tokens
    one, other = (write(model, tokens, n_tokens) for model in (pair.first, pair.second))
    found = []
    for (prompt, own), a, b in zip(children, one, other, strict=True):
        kld = float(pair.force(own, a).kld.mean())
        texts = pair.first.detokenize(a), pair.first.detokenize(b)
        found.append(Found(prompt, first_difference(a, b), kld, texts))
    return found
