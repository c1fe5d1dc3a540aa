"""Trees of tokens hold every request once, share what pays, and let a token see its own past only."""

from __future__ import annotations

import numpy as np
import pytest

from slm_exp.evaluation.backends.trees import Request, Tree, common_prefix, grow


def requests(*sequences: tuple[int, ...], targets: int = 1) -> list[Request]:
    return [Request(i, tokens, (9,) * targets) for i, tokens in enumerate(sequences)]


def random_requests(seed: int) -> list[Request]:
    """Contexts with branches of random lengths, some of them repeated, some prefixes of others."""
    rng = np.random.default_rng(seed)
    out: list[Request] = []
    for _ in range(9):
        context = tuple(rng.integers(0, 3, rng.integers(1, 60)).tolist())
        for _ in range(rng.integers(1, 5)):
            tokens = context + tuple(rng.integers(0, 3, rng.integers(0, 6)).tolist())
            targets = tuple(rng.integers(0, 3, rng.integers(1, len(tokens) + 1)).tolist())
            out.append(Request(len(out), tokens, targets))
    return out


@pytest.mark.parametrize("shared", [0, 900])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_reads_its_own_tokens(seed: int, shared: int) -> None:
    asked = [r._replace(tokens=(*range(5, 5 + shared), *r.tokens)) for r in random_requests(seed)]
    trees = grow(asked)
    assert sorted(r.owner for tree in trees for r in tree.requests) == list(range(len(asked)))
    assert [len(tree) for tree in trees] == sorted((len(tree) for tree in trees), reverse=True)
    assert all(not tree.trunk for tree in trees) == (shared == 0)
    for tree in trees:
        visible = tree.visible(len(tree) + 3)
        assert not np.triu(visible, 1).any()  # causal in the order of nodes
        assert (visible[len(tree):] == np.eye(len(visible), dtype=bool)[len(tree):]).all()  # padding sees itself alone
        assert not visible[: len(tree), len(tree):].any()
        for request, path, (owner, nodes, targets) in zip(tree.requests, tree.paths, tree.predictions(), strict=True):
            assert [*tree.trunk, *(tree.tokens[i] for i in path)] == list(request.tokens)
            assert [tree.positions[i] for i in path] == list(range(len(tree.trunk), len(request.tokens)))
            assert (owner, targets) == (request.owner, request.targets)
            assert nodes.tolist() == path[-len(targets):].tolist()
            for place, node in enumerate(path):  # what a node sees is its own sequence up to itself
                assert np.flatnonzero(visible[node]).tolist() == path[: place + 1].tolist()


def test_a_context_is_computed_once() -> None:
    context = tuple(range(100, 150))
    (tree,) = grow(requests(*((*context, i, i) for i in range(4))))
    assert len(tree) == 50 + 4 * 2
    assert len(tree.branches) == 4


def test_equal_requests_cost_nothing() -> None:
    (tree,) = grow(requests((1, 2, 3), (1, 2, 3), (1, 2)))
    assert len(tree) == 3
    assert [nodes.tolist() for _, nodes, _ in tree.predictions()] == [[1], [2], [2]]


def test_a_few_common_words_make_no_tree() -> None:
    """Sharing two tokens of hundred would double a row's attention."""
    trees = grow(requests(*((1, 2, *range(1000 * i, 1000 * i + 98)) for i in range(1, 4))))
    assert len(trees) == 3


def test_a_very_long_context_is_still_shared() -> None:
    context = tuple(range(8000))
    (tree,) = grow(requests(*((*context, 9000 + i) for i in range(4))))
    assert len(tree) == 8004


def test_short_trees_do_not_grow_without_end() -> None:
    """A prompt in front of everything must not make one row of a whole task: it is the trunk of all."""
    prompt = tuple(range(1500))
    trees = grow(requests(*((*prompt, *range(5000 + 100 * i, 5060 + 100 * i)) for i in range(80))))
    assert [tree.trunk for tree in trees] == [prompt] * 80
    assert [len(tree) for tree in trees] == [60] * 80
    assert trees[0].positions == list(range(1500, 1560))


def test_what_predicts_stands_behind_the_trunk() -> None:
    """Answers of 40 tokens after 100 shared ones: the last shared token predicts the first of each answer."""
    context = tuple(range(100))
    asked = [Request(i, (*context, *range(200 + 50 * i, 239 + 50 * i)), tuple(range(40))) for i in range(30)]
    trees = grow(asked)
    assert {tree.trunk for tree in trees} == {context[:99]}
    for tree in trees:
        assert all((nodes >= 0).all() and len(nodes) == 40 for _, nodes, _ in tree.predictions())


def test_trees_of_a_trunk_stand_together() -> None:
    one, other = tuple(range(300)), tuple(range(1000, 1200))
    asked = [(*start, 5000 + i, *range(i, 2 * i + 20)) for i in range(20) for start in (one, other, (7000 + i,))]
    trunks = [tree.trunk for tree in grow(requests(*asked))]
    assert [trunk for i, trunk in enumerate(trunks) if trunk != trunks[i - 1]] == [one, other, ()]


def test_common_prefix() -> None:
    assert common_prefix((), (1,)) == 0
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix((1, 2, 4), (1, 2, 3)) == 2


def test_an_empty_set() -> None:
    assert grow([]) == []
    assert len(Tree()) == 0
