// docker buildx bake --file images/docker-bake.hcl, in the root of the checkout; make images sets the variables.

variable "REGISTRY" { default = "" }
variable "VERSION" { default = "dev" }
variable "REVISION" { default = "unknown" }
variable "PYTHON" { default = "python:3.11.14-slim-bookworm" }
variable "PIP_CONF" { default = "" }
variable "CA_BUNDLE" { default = "" }
variable "BUILD_NETWORK" { default = "" }

function "tags" {
  params = [name]
  result = [
    "${REGISTRY == "" ? "" : "${REGISTRY}/"}hjepa-${name}:${VERSION}",
    "${REGISTRY == "" ? "" : "${REGISTRY}/"}hjepa-${name}:${VERSION}-${REVISION}",
  ]
}

group "default" {
  targets = ["prepare-data", "train", "evaluate", "tools"]
}

target "common" {
  context = "."
  network = BUILD_NETWORK == "" ? null : BUILD_NETWORK
  args    = { PYTHON = PYTHON, VERSION = VERSION, REVISION = REVISION }
  secret = concat(
    PIP_CONF == "" ? [] : ["id=pip.conf,src=${PIP_CONF}"],
    CA_BUNDLE == "" ? [] : ["id=ca.crt,src=${CA_BUNDLE}"],
  )
}

target "base" {
  name       = "base-${part}"
  inherits   = ["common"]
  matrix     = { part = ["python", "runtime", "torch", "code"] }
  dockerfile = "images/base/Containerfile"
  target     = part
}

target "step" {
  name       = step
  inherits   = ["common"]
  matrix     = { step = ["prepare-data", "train", "evaluate", "tools"] }
  dockerfile = "images/${step}/Containerfile"
  tags       = tags(step)
  contexts = {
    hjepa-python  = "target:base-python"
    hjepa-runtime = "target:base-runtime"
    hjepa-torch   = "target:base-torch"
    hjepa-code    = "target:base-code"
  }
}
