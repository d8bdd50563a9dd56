"""What holds for every engine by its types: what may become a reference has no schema, what has one no log-probs."""

from dataclasses import fields
from typing import get_type_hints

from prefpipe.engines.base import Draw, Engine, Query, Request, Response, Sample
from prefpipe.schemas import RefLogps


def names(row_type: type) -> set[str]:
    return {f.name for f in fields(row_type)}


def test_reference_log_probs_can_only_come_from_requests_without_a_schema() -> None:
    """A grammar renormalises log-probs, so the two ways through an engine share no type: a request or a draw cannot
    hold a schema, and what answers a query has nothing that fits into the cache of reference log-probs."""
    assert "schema" in names(Query)
    assert "schema" not in names(Request) | names(Draw)
    assert names(Response) == {"token_ids", "finish_reason"}
    assert "token_logps" in names(RefLogps) & names(Sample)
    assert "Response" not in str(get_type_hints(Engine.generate)["return"])
    assert "Sample" not in str(get_type_hints(Engine.respond)["return"])
