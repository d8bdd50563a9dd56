"""Stage 2, `prefpipe build-pairs`: completions with rewards -> pairs, labels or groups, and a ledger of the rest.

candidates.py      completions joined with rewards, in partitions by prompt; completion filters
prompt_filters.py  duplicate, near-duplicate and contaminated prompts
pair_rules.py      candidates of a prompt -> pairs (docs/pair-rules.md)
filters.py         pairs -> kept, or dropped with one reason
labels.py          candidates -> labels, class balance
output_rows.py     texts, token ids and log-probs of the chosen rows -> rows of the output datasets
texts.py           what is read from texts and token ids
accounting.py      in = out + sum of reasons
data_report.py     the checks D1-D14 before a training
stage.py           read -> pure steps -> write
"""

from prefpipe.stages.build_pairs.stage import run, summary

__all__ = ["run", "summary"]
