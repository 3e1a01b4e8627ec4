"""The real Prometheus on loopback, for the tests beside this file."""
import json
import shutil
import subprocess
import urllib.parse

import named_metrics
from server_process import fetch, wait_until


class Prometheus:
    """Scrapes `target` every second and evaluates the project's rules. Ready when constructed."""

    def __init__(self, work, url, target):
        shutil.rmtree(work / "data", ignore_errors=True)
        config = work / "prometheus.yml"
        files = named_metrics.FILES
        config.write_text(json.dumps({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(files / "recordings.yml"), str(files / "alerts.yml")],
            "scrape_configs": [{"job_name": "demo", "static_configs": [{"targets": [target]}]}]}))
        self.url = url
        self.log = open(work / "log", "w")
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={work / 'data'}",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=self.log, stderr=self.log)
        wait_until(lambda: "Ready" in fetch(self.url + "/-/ready"), "Prometheus is ready")

    def api(self, path, **parameters):
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        answer = json.loads(fetch(url))
        assert answer["status"] == "success", answer
        return answer["data"]

    def samples(self, expression):
        return self.api("query", query=expression)["result"]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
