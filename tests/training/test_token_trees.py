"""Trees of tokens: what they hold, against the prefixes of the rows written out."""

import torch
from hypothesis import given, strategies as st

from calibrated_rewards.training.offline.token_trees import TokenTree, TreeRows, save_enough

# Few letters: rows begin alike, are equal, or empty.
ROWS = st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8)
COMPLETIONS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=5)), min_size=1)


@given(ROWS)
def test_a_tree_has_a_node_for_each_distinct_prefix(rows: list[list[int]]) -> None:
    """Paths spell the rows, parents come first, and a node sees its ancestors and itself."""
    tree = TokenTree.grow(rows)

    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    spelled: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        assert parent < len(spelled)
        spelled.append((*(spelled[parent] if parent >= 0 else ()), token))
    assert len(spelled) == len(prefixes)
    assert {*spelled} == prefixes
    assert tree.depths == [len(each) - 1 for each in spelled]
    assert [[spelled[node] for node in path] for path in tree.paths] == [
        [tuple(row[:n]) for n in range(1, len(row) + 1)] for row in rows
    ]
    assert tree.sees.tolist() == [[a == b[: len(a)] for a in spelled] for b in spelled]
    flat = [token for row in rows for token in row]
    assert [flat[at] for at in tree.sources] == tree.tokens
    several = [sum(each[:-1] == one for each in spelled) > 1 for one in spelled]
    assert tree.branches == any(several)


@given(COMPLETIONS)
def test_steps_are_the_distinct_next_tokens_and_sum_to_each_completion(rows: list[tuple[int, list[int]]]) -> None:
    """A value for each prefix of a prompt's completions, summed over the prefixes of each."""
    trees = TreeRows([row for _, row in rows], [owner for owner, _ in rows], 3)
    steps, numbers = trees.steps
    states = [(at,) for at in range(3)]
    for at, tree in enumerate(trees.trees):
        spelled: list[tuple[int, ...]] = []
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            spelled.append((*(spelled[parent] if parent >= 0 else (at,)), token))
        states += spelled

    prefixes = [(*states[source], token) for source, token in steps]

    assert len(prefixes) == len({*prefixes})
    assert {*prefixes} == {(at, *row[:n]) for at, row in rows for n in range(1, len(row) + 1)}
    assert [[prefixes[i] for i in each] for each in numbers] == [
        [(at, *row[:n]) for n in range(1, len(row) + 1)] for at, row in rows
    ]
    values = torch.arange(len(steps)).double().exp2()
    assert trees.sum_steps(values).tolist() == [sum(2.0**i for i in each) for each in numbers]


@given(COMPLETIONS)
def test_states_of_nodes_are_those_of_tokens(rows: list[tuple[int, list[int]]]) -> None:
    """From the completions' to the nodes' and back, where equal prefixes have equal states."""
    trees = TreeRows([row for _, row in rows], [owner for owner, _ in rows], 3)
    states = [
        torch.tensor([[at, int("1" + "".join(map(str, row[:n])))] for n in range(1, len(row))]).reshape(-1, 2)
        for at, row in rows
    ]

    nodes = torch.nn.utils.rnn.pad_sequence(trees.gather_states(states), batch_first=True, padding_value=-1)

    assert [each.tolist() for each in trees.spread_states(nodes)] == [each.tolist() for each in states]


def test_nodes_see_the_tokens_of_their_prompt() -> None:
    """Padding of the shorter prompt is seen by none, and padded nodes by no node."""
    trees = TreeRows([[5, 6, 9], [5, 7, 9], [8, 9]], [0, 0, 1], 2)

    mask = trees.mask_attention(torch.tensor([[1, 1], [1, 0]]))

    assert mask.int().tolist() == [
        [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]],
        [[[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]],
    ]
    tokens, own, depths = trees.pad(torch.device("cpu"))
    assert (tokens * own).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert own.tolist() == [[True] * 3, [True, False, False]]
    assert depths[0].tolist() == [0, 1, 1]


def test_trees_pay_where_tokens_are_shared() -> None:
    """Fewer nodes than tokens, with the padding of the smaller tree; not where no token is fed."""
    alike, apart = [[1, 2, 3], [1, 2, 4], [1, 2, 5]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]

    assert save_enough([TreeRows(alike, [0, 0, 0], 1)])
    assert not save_enough([TreeRows(apart, [0, 0, 0], 1)])
    assert not save_enough([TreeRows(alike + apart, [0, 0, 0, 1, 1, 1], 2)])
    assert not save_enough([TreeRows([[1], [2]], [0, 0], 1)])
    assert save_enough([TreeRows([[1], [2]], [0, 0], 1), TreeRows(alike, [0, 0, 0], 1)])
    assert not save_enough([])
