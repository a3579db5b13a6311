"""An image that cannot be pulled: needs an operator that was told a wrong trainer image."""

from tests.cluster import install, kit
from tests.cluster.workbench import Workbench, tiny_classification


def test_an_image_that_cannot_be_pulled_is_named(workbench: Workbench) -> None:
    image = {"repository": "localhost/no-such-image", "tag": "0"}
    install.install_operator(trainer={"image": image})
    try:
        name = workbench.submit(tiny_classification())

        def told(job: dict[str, object]) -> bool:
            return kit.condition(job, "Running").get("reason") == "ImageNotPulled"

        job = kit.wait_for(workbench.namespace, name, told, 90, "Running=False, ImageNotPulled")
        assert "localhost/no-such-image:0" in job["status"]["message"]
        assert job["status"]["phase"] == "Pending"
        workbench.delete(name)
    finally:
        install.install_operator()
