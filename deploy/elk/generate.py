"""Writes the component template of the figures and the Kibana dashboard, from the names that the daemon logs.

Run ``python deploy/elk/generate.py``. A test fails when the committed files differ from what it writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.status.step_names import RUN_NAMES, SOURCE_NAMES

HERE = Path(__file__).parent
DATA_VIEW = "rollout-logs"
SEARCH = "rollout-events"
INDEX = "logs-rollout-*"

# -- the component template --------------------------------------------------------------------------------------------

KEYWORD = {"type": "keyword", "ignore_above": 1024}
DIMENSION = {"type": "keyword", "time_series_dimension": True}
FLATTENED = {"type": "flattened", "ignore_above": 1024}
COUNT = {"type": "long", "time_series_metric": "gauge"}
GAUGE = {"type": "double", "time_series_metric": "gauge"}


def nested(names: list[str]) -> dict[str, Any]:
    """``a/b`` as the properties of an object ``a``, all gauges."""
    properties: dict[str, Any] = {}
    for name in names:
        head, _, rest = name.partition("/")
        if rest:
            properties.setdefault(head, {"properties": {}})["properties"] |= nested([rest])
        else:
            properties[head] = GAUGE
    return properties


def component() -> dict[str, Any]:
    """What the lines of a rollout orchestrator have beside the fields of ECS."""
    names = [name for name in SOURCE_NAMES if not name.startswith("dropped/")]
    names += [name.removeprefix("rollout/") for name in RUN_NAMES]
    rollout = {"step": COUNT, "policy_version": COUNT, **nested(names), "dropped": FLATTENED}
    cause = {"kind": KEYWORD, "sentence": {"type": "match_only_text"}, "sources": FLATTENED}
    properties = {
        "source": {"properties": {"name": DIMENSION}},
        "engine": {"properties": {"name": KEYWORD}},
        "rollout": {"properties": rollout},
        "drop": {"properties": {"reason": KEYWORD, "groups": COUNT}},
        "lease": {"properties": {"rank": COUNT, "groups": COUNT}},
        "logging": {"properties": {"lost_lines": COUNT}},
        "cause": {"properties": cause},
        "metrics": FLATTENED,
        "state": FLATTENED,
    }
    meta = {"description": "Figures of a rollout orchestrator; written by generate.py"}
    return {"template": {"mappings": {"properties": properties}}, "_meta": meta}


# -- the dashboard -----------------------------------------------------------------------------------------------------

BY_SOURCE = 'event.dataset: "step.source"'
IN_BATCH = f"{BY_SOURCE} and rollout.sample_count > 0"  # a source that has nothing in a batch has means of 0
BY_STEP = 'event.dataset: "step"'
DROPS = 'event.dataset: "step.drop"'
LATE = 'event.action: "batch_late"'
EVENTS = "not event.dataset: step* and not event.dataset: journal"

# title, kind of series, query, how values of a bucket of time become one, field, split by
PANELS = (
    ("Weight, by source", "area_stacked", BY_SOURCE, "average", "rollout.weight", "source.name"),
    ("Samples handed out, by source", "bar_stacked", BY_SOURCE, "sum", "rollout.sample_count", "source.name"),
    ("Mean reward, by source", "line", IN_BATCH, "average", "rollout.raw_reward.mean", "source.name"),
    ("Mean response tokens, by source", "line", IN_BATCH, "average", "rollout.response_len.mean", "source.name"),
    ("Groups buffered, by source", "line", BY_SOURCE, "average", "rollout.buffer_groups", "source.name"),
    ("Groups in flight, by source", "line", BY_SOURCE, "average", "rollout.in_flight", "source.name"),
    ("Highest staleness, by source", "line", BY_SOURCE, "max", "rollout.staleness.max", "source.name"),
    ("Groups dropped, by reason", "bar_stacked", DROPS, "sum", "drop.groups", "drop.reason"),
    ("Trainer waited, in seconds", "bar_stacked", BY_STEP, "sum", "rollout.trainer_wait_s", None),
    ("Late-batch warnings, by cause", "bar_stacked", LATE, "count", "___records___", "cause.kind"),
)  # fmt: skip

WIDTH, HEIGHT = 24, 12  # of a panel, in Kibana's grid of 48 columns


def data_view_reference(name: str) -> dict[str, str]:
    """The object says ``name`` where it means the data view."""
    return {"type": "index-pattern", "id": DATA_VIEW, "name": name}


def columns(how: str, field: str, split: str | None) -> dict[str, Any]:
    """What a chart asks Elasticsearch for: time, value, and what it is split by."""
    asked: dict[str, Any] = {}
    if split is not None:
        order = {"orderBy": {"type": "alphabetical"}, "orderDirection": "asc", "otherBucket": True}
        asked["split"] = {
            "label": split, "dataType": "string", "operationType": "terms", "scale": "ordinal", "sourceField": split,
            "isBucketed": True, "params": {"size": 20, **order, "parentFormat": {"id": "terms"}},
        }  # fmt: skip
    asked["time"] = {
        "label": "@timestamp", "dataType": "date", "operationType": "date_histogram", "scale": "interval",
        "sourceField": "@timestamp", "isBucketed": True, "params": {"interval": "auto", "includeEmptyRows": False},
    }  # fmt: skip
    asked["value"] = {
        "label": how if field == "___records___" else f"{how} of {field}", "dataType": "number", "operationType": how,
        "scale": "ratio", "sourceField": field, "isBucketed": False, "params": {"emptyAsNull": True},
    }  # fmt: skip
    return asked


def chart(title: str, series: str, query: str, how: str, field: str, split: str | None) -> dict[str, Any]:
    """A chart over time, as Lens has it within a dashboard."""
    asked = columns(how, field, split)
    layer = {"layerId": "data", "layerType": "data", "seriesType": series, "xAccessor": "time", "accessors": ["value"]}
    if split is not None:
        layer["splitAccessor"] = "split"
    return {
        "title": title,
        "type": "lens",
        "visualizationType": "lnsXY",
        "references": [data_view_reference("indexpattern-datasource-layer-data")],
        "state": {
            "query": {"language": "kuery", "query": query},
            "filters": [],
            "datasourceStates": {
                "formBased": {
                    "layers": {"data": {"columns": asked, "columnOrder": list(asked), "incompleteColumns": {}}}
                }
            },
            "visualization": {
                "preferredSeriesType": series,
                "layers": [layer],
                "legend": {"isVisible": split is not None, "position": "right"},
                "fittingFunction": "Linear",
                "valueLabels": "hide",
                "axisTitlesVisibilitySettings": {"x": False, "yLeft": False, "yRight": False},
            },
        },
    }


def panels() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The dashboard's panels, and what they refer to."""
    placed, references = [], []
    for number, panel in enumerate(PANELS):
        name = f"chart-{number}"
        place = {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT, "i": name}
        config = {"attributes": chart(*panel), "enhancements": {}}
        placed.append(
            {"type": "lens", "panelIndex": name, "title": panel[0], "gridData": place, "embeddableConfig": config}
        )
        references.append(data_view_reference(f"{name}:indexpattern-datasource-layer-data"))
    bottom = (len(PANELS) + 1) // 2 * HEIGHT
    place = {"x": 0, "y": bottom, "w": 2 * WIDTH, "h": 2 * HEIGHT, "i": "events"}
    listed = {"type": "search", "panelIndex": "events", "panelRefName": "panel_events", "embeddableConfig": {}}
    placed.append({**listed, "gridData": place})
    references.append({"type": "search", "id": SEARCH, "name": "events:panel_events"})
    return placed, references


def dashboard() -> dict[str, Any]:
    """The dashboard, with a control that chooses the run."""
    placed, references = panels()
    control = {
        "type": "optionsListControl", "order": 0, "width": "medium", "grow": False,
        "explicitInput": {"id": "run", "fieldName": "labels.run", "title": "Run", "singleSelect": True},
    }  # fmt: skip
    return saved(
        "dashboard",
        "rollout-orchestrator",
        {
            "title": "Rollout orchestrator",
            "description": "Weights, rewards, lengths, buffers, staleness, drops and waits by source. Choose one run.",
            "panelsJSON": json.dumps(placed),
            "optionsJSON": json.dumps({"useMargins": True, "syncColors": True, "syncCursor": True}),
            "controlGroupInput": {
                "controlStyle": "oneLine",
                "chainingSystem": "HIERARCHICAL",
                "ignoreParentSettingsJSON": "{}",
                "panelsJSON": json.dumps({"run": control}),
            },
            "kibanaSavedObjectMeta": {"searchSourceJSON": search_source("")},
            "timeRestore": True,
            "timeFrom": "now-24h",
            "timeTo": "now",
            "refreshInterval": {"pause": False, "value": 30_000},
        },
        [*references, data_view_reference("controlGroup_run:optionsListDataView")],
        migrated="8.9.0",
    )  # fmt: skip


def search_source(query: str, **more: Any) -> str:
    """A query, as saved objects have it."""
    return json.dumps({"query": {"language": "kuery", "query": query}, "filter": [], **more})


def saved(
    kind: str, name: str, attributes: dict[str, Any], references: list[dict[str, str]], *, migrated: str = "8.0.0"
) -> dict[str, Any]:
    """A saved object, of the versions of its format that Kibana 8.10 writes; later ones bring it up to date."""
    return {
        "type": kind, "id": name, "attributes": attributes, "references": references,
        "coreMigrationVersion": "8.8.0", "typeMigrationVersion": migrated, "managed": False,
    }  # fmt: skip


def saved_objects() -> list[dict[str, Any]]:
    """What Kibana imports: data view, list of events, dashboard."""
    view = {"title": INDEX, "name": "Rollout orchestrator", "timeFieldName": "@timestamp"}
    index = "kibanaSavedObjectMeta.searchSourceJSON.index"
    events = {
        "title": "Events of the rollout orchestrator",
        "columns": ["log.level", "event.dataset", "source.name", "message"],
        "sort": [["@timestamp", "desc"]],
        "kibanaSavedObjectMeta": {"searchSourceJSON": search_source(EVENTS, indexRefName=index)},
    }
    return [
        saved("index-pattern", DATA_VIEW, view, []),
        saved("search", SEARCH, events, [data_view_reference(index)]),
        dashboard(),
    ]


def files() -> dict[str, str]:
    """Name and content of what is written."""
    return {
        "component-figures.json": json.dumps(component(), indent=2) + "\n",
        "kibana.ndjson": "".join(json.dumps(item, sort_keys=True) + "\n" for item in saved_objects()),
    }


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content, encoding="utf-8")
