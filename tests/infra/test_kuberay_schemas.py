"""The Kubernetes objects against the schemas of KubeRay's CRDs and of Kubernetes, unknown fields forbidden."""

import copy
import functools
import gzip
import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from infra_files import ROOT, Document, manifest, manifests, overlay, pod_templates

CRDS = ROOT.parent / "shared" / "crds"
KUBERNETES = "1.34"
BUILT_IN = [document for document in manifests() if not document["apiVersion"].startswith("ray.io/")]
CUSTOM = [manifest("RayCluster"), manifest("RayJob"), *overlay("raycronjob")]

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason="the schemas of KubeRay's CRDs are not beside the repository (../shared/crds)"
)


def forbid_unknown(schema: Any, *, root: bool = False) -> Any:
    """A CRD's schema as JSON Schema. The API server prunes unknown fields in silence; here they are errors."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema:
        properties = {key: forbid_unknown(value) for key, value in schema["properties"].items()}
        schema["properties"] = properties | ({"metadata": {"type": "object"}} if root else {})
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
        defaulted = {key for key, value in properties.items() if isinstance(value, dict) and "default" in value}
        schema["required"] = [key for key in schema.get("required", []) if key not in defaulted]
    for key in ("additionalProperties", "items"):
        if isinstance(schema.get(key), dict):
            schema[key] = forbid_unknown(schema[key])
    return schema


def without_nulls(value: Any) -> Any:
    """The API server drops nulls before it validates."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@functools.cache
def crd_validator(kind: str) -> jsonschema.Draft7Validator:
    crd = json.loads(gzip.decompress((CRDS / f"ray.io_{kind.lower()}s.json.gz").read_bytes()))
    assert (crd["apiVersion"], crd["kind"]) == ("ray.io/v1", kind)
    properties = crd["schema"]["properties"] | {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return jsonschema.Draft7Validator(forbid_unknown(crd["schema"] | {"properties": properties}, root=True))


def crd_errors(document: Document) -> list[str]:
    errors = crd_validator(document["kind"]).iter_errors(without_nulls(document))
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in errors]


@needs_crds
@pytest.mark.parametrize("document", CUSTOM, ids=lambda document: document["kind"])
def test_every_custom_object_satisfies_its_crd(document: Document) -> None:
    assert crd_errors(document) == []


@needs_crds
def test_the_crd_check_notices_a_misspelt_field_and_a_wrong_type() -> None:
    misspelt, wrong = copy.deepcopy(manifest("RayJob")), copy.deepcopy(manifest("RayCluster"))
    misspelt["spec"]["shutDownAfterJobFinishes"] = True
    wrong["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "4"
    assert len(crd_errors(misspelt)) == 1
    assert len(crd_errors(wrong)) == 1


@pytest.mark.parametrize(
    "document", BUILT_IN, ids=lambda document: f"{document['kind']}-{document['metadata']['name']}"
)
def test_every_built_in_object_satisfies_kubernetes(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", pod_templates())
def test_every_pod_template_satisfies_kubernetes(name: str) -> None:
    template = pod_templates()[name]
    document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_kubernetes_check_notices_a_misspelt_field() -> None:
    misspelt = copy.deepcopy(manifest("CronJob"))
    misspelt["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(misspelt, KUBERNETES, strict=True)
