"""The manifests for Kubernetes: each against its schema, and together against the program."""

import copy

import kubernetes_validate
import pytest
import yaml
from test_deploy import DEPLOY, SETTINGS

FOLDER = DEPLOY / "kubernetes"
# The oldest that is looked at, and the newest that the schemas know.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    (name, manifest)
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]


def named(kind: str, name: str) -> dict:
    (found,) = [
        manifest
        for _, manifest in MANIFESTS
        if manifest["kind"] == kind and manifest["metadata"]["name"] == f"flash-sale{name}"
    ]
    return found


def pods() -> dict[str, dict]:
    return {
        name: named(kind, f"-{name}")["spec"]["template"]
        for kind, name in (("Job", "prepare"), ("Deployment", "web"), ("Deployment", "worker"))
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "manifest", [pytest.param(m, id=f"{m['kind']}-{m['metadata']['name']}") for _, m in MANIFESTS]
)
def test_a_manifest_has_its_kind_s_form(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_find_a_wrong_member():
    manifest = copy.deepcopy(named("Deployment", "-web"))
    manifest["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_every_file_is_a_resource():
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def test_no_pod_may_do_more_than_it_needs():
    for name, pod in pods().items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["image"] == KUSTOMIZATION["images"][0]["name"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"/var/lib/flash-sale", "/tmp"}, name
        assert "memory" in container["resources"]["limits"]


def test_settings_are_ours_and_no_secret_is_among_them():
    given = set(named("ConfigMap", "")["data"])
    assert given <= SETTINGS
    text = (FOLDER / "settings.yaml").read_text()
    needed = ("REDIS_URL", "DATABASE_URL", "SECRET_KEY", "ADMIN_EMAIL", "ADMIN_PASSWORD",
              "ADMIN_API_TOKEN")  # fmt: skip
    for name in needed:
        assert name in text
        assert name not in given
    assert not [m for _, m in MANIFESTS if m["kind"] == "Secret"]


def test_programs_and_probes_are_those_of_the_image():
    image = (DEPLOY / "docker" / "Dockerfile").read_text()
    (web,) = pods()["web"]["spec"]["containers"]
    assert f"EXPOSE {web['ports'][0]['containerPort']}" in image
    assert str(web["args"]).replace("'", '"') in image
    assert web["readinessProbe"]["httpGet"]["path"] == "/readyz/sale"
    for probe in ("livenessProbe", "startupProbe"):
        assert web[probe]["httpGet"]["path"] == "/healthz"
    # From the moment at which it is told to end: the pause, and 8 s of a process that ends.
    pause = int(web["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pods()["web"]["spec"]["terminationGracePeriodSeconds"] > pause + 8


def test_what_selects_pods_finds_them():
    labels = {name: pod["metadata"]["labels"] for name, pod in pods().items()}

    def selects(selector: dict) -> set[str]:
        wanted = selector.get("matchLabels", selector).items()
        return {name for name, has in labels.items() if wanted <= has.items()}

    for name in ("web", "worker"):
        assert selects(named("Deployment", f"-{name}")["spec"]["selector"]) == {name}
        assert selects(named("PodDisruptionBudget", f"-{name}")["spec"]["selector"]) == {name}
        scaled = named("HorizontalPodAutoscaler", f"-{name}")["spec"]
        assert scaled["scaleTargetRef"]["name"] == f"flash-sale-{name}"
        # A budget of one would else stop every drain of a node.
        assert scaled["minReplicas"] >= 2
        for spread in pods()[name]["spec"]["topologySpreadConstraints"]:
            assert selects(spread["labelSelector"]) == {name}
    assert selects(named("Service", "-web")["spec"]["selector"]) == {"web"}
    assert selects(named("NetworkPolicy", "-web-in")["spec"]["podSelector"]) == {"web"}
    to_servers = named("NetworkPolicy", "-to-servers")["spec"]["podSelector"]
    assert selects(to_servers) == {"prepare", "web", "worker"}
    assert named("NetworkPolicy", "-nothing-else")["spec"]["podSelector"] == {}
