"""Trees of the tokens of completions: a prefix that several completions of one prompt begin with is read once.

The nodes of all trees of a batch stand in one padded row for each prompt. A node sees its prompt and its ancestors, as
its last token does in a completion that is read alone, and has the position that it has there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from calibrated_rewards.models.parts import pad_right

# Trees with more nodes, or that save less, are not read: each node is masked from most others.
MOST_NODES = 512
WORTHWHILE = 0.85


class TokenTree(NamedTuple):
    """The distinct prefixes of some rows of tokens: a node for each, which is numbered after its parent."""

    tokens: list[int]
    parents: list[int]
    """-1: the node is the first token of a row."""
    depths: list[int]
    sources: list[int]
    """Where each node's token is found first in the rows, laid end to end."""
    paths: list[list[int]]
    """The nodes of each row."""

    @classmethod
    def grow(cls, rows: Sequence[Sequence[int]]) -> "TokenTree":
        """Number the distinct prefixes of rows.

        >>> tree = TokenTree.grow([[5, 6], [5, 7], [5]])
        >>> tree.tokens, tree.parents, tree.paths
        ([5, 6, 7], [-1, 0, 0], [[0, 1], [0, 2], [0]])
        """
        tree, nodes, place = cls([], [], [], [], []), dict[tuple[int, int], int](), 0
        for row in rows:
            node, path = -1, list[int]()
            for depth, token in enumerate(row):
                parent, node = node, nodes.setdefault((node, token), len(nodes))
                if node == len(tree.tokens):
                    tree.tokens.append(token)
                    tree.parents.append(parent)
                    tree.depths.append(depth)
                    tree.sources.append(place + depth)
                path.append(node)
            tree.paths.append(path)
            place += len(row)
        return tree

    @property
    def branches(self) -> bool:
        """Tell if a node has two children."""
        inner = [parent for parent in self.parents if parent >= 0]
        return len(set(inner)) < len(inner)

    @property
    def sees(self) -> Tensor:
        """The nodes that each node sees: its ancestors and itself; boolean, (nodes, nodes)."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


@dataclass(frozen=True, eq=False)
class TreeRows:
    """Completions of several prompts as trees, one row of nodes for each prompt; the last tokens are not fed."""

    completions: Sequence[list[int]]
    """Of one token at least."""
    owners: Sequence[int]
    """The number of each completion's prompt."""
    prompts: int

    @cached_property
    def members(self) -> list[list[int]]:
        """The numbers of each prompt's completions."""
        return [[i for i, owner in enumerate(self.owners) if owner == at] for at in range(self.prompts)]

    @cached_property
    def trees(self) -> list[TokenTree]:
        """The tree of each prompt's completions."""
        return [grow_tree([self.completions[i] for i in own]) for own in self.members]

    @cached_property
    def width(self) -> int:
        """The number of nodes of the largest tree."""
        return max(len(tree.tokens) for tree in self.trees)

    def pad(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Pad the nodes on the right: their tokens, the mask of those that are none, and their depths."""
        tokens, mask = pad_right([tree.tokens for tree in self.trees], 0, device)
        depths, _ = pad_right([tree.depths for tree in self.trees], 0, device)
        return tokens, mask.bool(), depths

    def mask_attention(self, prompts: Tensor) -> Tensor:
        """Tell who sees whom, (prompts, 1, nodes, tokens of a prompt + nodes), from the mask of the prompts' tokens."""
        sees = torch.eye(self.width, dtype=torch.bool).repeat(self.prompts, 1, 1)
        for whole, tree in zip(sees, self.trees, strict=True):
            whole[: len(tree.tokens), : len(tree.tokens)] = tree.sees
        before = prompts.bool()[:, None].expand(-1, self.width, -1)
        return torch.cat([before, sees.to(prompts.device)], 2)[:, None]

    def gather_states(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Take the states of each prompt's nodes from those of the completions' tokens."""
        own = [torch.cat([states[i] for i in at]) if at else states[0][:0] for at in self.members]
        return [rows[tree.sources] for rows, tree in zip(own, self.trees, strict=True)]

    def spread_states(self, nodes: Tensor) -> list[Tensor]:
        """Give each completion the states of its tokens, from those of the nodes, (prompts, nodes, hidden size)."""
        states = [nodes[0, :0]] * len(self.completions)
        for own, at, tree in zip(nodes, self.members, self.trees, strict=True):
            for i, path in zip(at, tree.paths, strict=True):
                states[i] = own[path]
        return states

    @cached_property
    def steps(self) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """The distinct steps from a state to a next token, and the numbers of each completion's.

        States are numbered: those of the prompts' last tokens, then those of all nodes.
        """
        numbers: dict[tuple[int, int], int] = {}
        rows: list[list[int]] = [[]] * len(self.completions)
        start = self.prompts
        for at, (own, tree) in enumerate(zip(self.members, self.trees, strict=True)):
            for i, path in zip(own, tree.paths, strict=True):
                states = [at, *(start + node for node in path)]
                pairs = zip(states, self.completions[i], strict=True)
                rows[i] = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
            start += len(tree.tokens)
        return list(numbers), rows

    def sum_steps(self, values: Tensor) -> Tensor:
        """Sum the values of each completion's steps."""
        _, rows = self.steps
        owners = torch.tensor([i for i, row in enumerate(rows) for _ in row], device=values.device)
        steps = torch.tensor([step for row in rows for step in row], device=values.device)
        return values.new_zeros(len(rows)).index_add(0, owners, values[steps])


def grow_tree(completions: Sequence[list[int]]) -> TokenTree:
    """Number the distinct prefixes that are fed: nothing is read behind a completion's last token."""
    return TokenTree.grow([row[:-1] for row in completions])


def save_enough(parts: Sequence[TreeRows]) -> bool:
    """Tell if far fewer nodes are read than there are tokens, padding included."""
    widths = [trees.width for trees in parts]
    fed = sum(len(row) - 1 for trees in parts for row in trees.completions)
    nodes = sum(trees.prompts * width for trees, width in zip(parts, widths, strict=True))
    return fed > 0 and max(widths) <= MOST_NODES and nodes <= WORTHWHILE * fed
