"""Queries for edits that come with their own tests: CounterFact's and zsRE's."""

from __future__ import annotations

from mi_hops.editing.request_files import Requests
from mi_hops.reasoning.queries import Draft, Query, QuerySets

_NOTHING = {
    "wordings": "the record has no paraphrase",
    "same_relation": "the record has no neighbours whose object is known",
    "specificity": "the record has no unrelated question with its answer",
}


def request_sets(requests: Requests) -> QuerySets:
    """The prompts by which the records of a file test their edits, as queries for `evaluate`.

    Sets: ``efficacy`` (the prompt taught), ``wordings`` (paraphrases), ``same_relation`` (CounterFact's
    neighbours, whose answer is to stay) and ``specificity`` (zsRE's unrelated question). In `Evaluation.table`
    the statistic ``target_over_wrong_after`` is how often the new object is more probable than the old
    one (of neighbours the other way round): the efficacy, paraphrase and neighbourhood scores of
    CounterFact (ES, PS, NS). Answers of several tokens are compared by their mean token probability, where
    the published code takes the mean log-probability.

    Args:
        requests: from `load_requests`; give the same to `evaluate` as the cases.

    Raises:
        ValueError: requests without such prompts.

    Source: arXiv 2202.05262, section 3.4 and appendix.

    Examples:
        >>> import json, tempfile
        >>> from mi_hops.editing import load_requests
        >>> from mi_hops.reasoning import request_sets
        >>> record = {"case_id": 0, "requested_rewrite": {"prompt": "{} plays", "subject": "Ada Moss",
        ...     "target_new": {"str": "the harp"}, "target_true": {"str": "chess"}},
        ...     "paraphrase_prompts": ["What Ada Moss plays is"], "neighborhood_prompts": ["Bo Lind plays"]}
        >>> path = f"{tempfile.mkdtemp()}/counterfact.json"
        >>> with open(path, "w") as file: json.dump([record], file)
        >>> print(request_sets(load_requests(path)).describe())
        1 cases, 3 queries
        efficacy: 1 queries of 1 cases, 0 cases skipped
        wordings: 1 queries of 1 cases, 0 cases skipped
        same_relation: 1 queries of 1 cases, 0 cases skipped
    """
    if not any(requests.probes.values()):
        raise ValueError(
            "these requests come without prompts that test them; read some with load_requests"
        )
    queries: list[Query] = []
    skipped: list[tuple[str, str, str]] = []
    sets = dict.fromkeys(p.set for probes in requests.probes.values() for p in probes)
    for request in requests:
        for name in sets:
            probes = [p for p in requests.probes[request.id] if p.set == name]
            drafts = [Draft(p.prompt, p.answer, p.aliases, request.id, p.wrong) for p in probes]
            queries += [draft.query(request.id, name, i) for i, draft in enumerate(drafts)]
            if not drafts:
                skipped.append((name, request.id, _NOTHING[name]))
    ids = tuple(request.id for request in requests)
    return QuerySets(tuple(queries), ids, tuple(skipped), {"source": requests.source})
