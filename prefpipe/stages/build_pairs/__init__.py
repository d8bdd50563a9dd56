"""Stage 2, `prefpipe build-pairs`: completions with rewards -> pairs, labels or groups, and a ledger of the other rows.

stage.py           the steps, from open inputs to the manifest
reward_values.py   the reward of a completion, from one column or a sum of several
prompt_filters.py  duplicate, near-duplicate and contaminated prompts
candidates.py      completions joined with rewards, in partitions by prompt; completion filters
pair_rules.py      candidates of a prompt -> pairs (docs/pair-rules.md)
user_rules.py      the same by functions of users, checked
filters.py         pairs -> kept, or dropped with one reason
pairs.py           pair rule, filters, rows of pairs
label_rules.py     candidates -> desirable or undesirable, class weights
labels.py          label rule, rows of labels, the KL bank
groups.py          ranked groups
output_rows.py     texts, token ids and log-probs of the rows in use -> rows of the output datasets
trl.py             the same rows as TRL reads them
accounting.py      in = out + sum of reasons
data_report.py     the checks D1-D15 before a training; data_measures.py and surface.py measure them
tasks.py           a partition as a task, in this process or in several
partitions.py      rows of several runs in partitions of whole prompts
texts.py           measures of texts and token ids
"""

from prefpipe.stages.build_pairs.stage import run, summary

__all__ = ["run", "summary"]
