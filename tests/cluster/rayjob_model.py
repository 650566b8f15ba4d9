"""The part of KubeRay's ray.io/v1 RayJob that the project uses, strictly: no unknown field, no wrong type.

Optional fields that our file does not use are left out on purpose: using one means adding it here first.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGTP]i?)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Port(Strict):
    name: Name
    containerPort: Annotated[int, Field(ge=1, le=65535)]


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class VolumeMount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: bool


class Container(Strict):
    name: Name
    image: str
    securityContext: ContainerSecurity
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[VolumeMount]


class Claim(Strict):
    claimName: Name


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None

    @model_validator(mode="after")
    def has_one_source(self) -> "Volume":
        if (self.persistentVolumeClaim is None) == (self.emptyDir is None):
            raise ValueError(f"volume {self.name} needs exactly one source")
        return self


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSecurity(Strict):
    runAsNonRoot: bool
    runAsUser: Count
    fsGroup: Count


class PodSpec(Strict):
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def mounts_only_its_volumes(self) -> "PodSpec":
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        if mounted != {volume.name for volume in self.volumes}:
            raise ValueError(f"mounted are {sorted(mounted)}, not the volumes of the pod")
        return self


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def is_in_range(self) -> "WorkerGroup":
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("minReplicas <= replicas <= maxReplicas does not hold")
        return self


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    activeDeadlineSeconds: Annotated[int, Field(ge=1)]
    backoffLimit: Count
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def cleans_up_only_what_it_shuts_down(self) -> "RayJobSpec":
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class Metadata(Strict):
    name: Annotated[Name, Field(max_length=47)]  # KubeRay adds suffixes for the pods


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
