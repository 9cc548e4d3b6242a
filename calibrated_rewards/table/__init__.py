"""ReferenceTable: the sorted reference scores of each prompt, and where a new score stands among them.

A table is built in bounded memory (`build`), stored as two files in a directory (`storage`), opened by mapping
(`ReferenceTable.load`) and searched with numpy (`search`) or on a GPU (`torch_search`). `selection` finds the prompts
whose references differ. `hub` uploads a table to the Hub, with the rollouts of its run and a `card`.
"""

from calibrated_rewards.prompts import UnknownPromptError as UnknownPromptError
from calibrated_rewards.table.build import Row as Row
from calibrated_rewards.table.reference_table import (
    Duplicates as Duplicates,
    ReferenceTable as ReferenceTable,
)
from calibrated_rewards.table.selection import Selection as Selection, select_prompts as select_prompts
