"""Remote shards: the same batches as from the disk, in a bounded cache, through slow and failing servers."""

import http.client
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dali.pipeline.cache import Cache, kept_in
from simclr_dali.pipeline.download import Patience
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.stream import Batch
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, load_split
from tests.conftest import run_python
from tests.loaders import two_views
from tests.runs import metrics, pretrain, tiny_config
from tests.web import served

SETTING = LoaderConfig(size=16, device=torch.device("cpu"))
PLENTY = 1 << 30


def stream(split: Split, epochs: int = 2) -> list[Batch]:
    order = Order(split.shards.shard_sizes(), 24, 2, 1, 3)
    return list(two_views(split, order, Recipe(), SETTING, epochs=epochs))


def opened(url: str, cache: Cache, split: str = "train") -> Split:
    """A split on a server that is asked again at once."""
    return open_split(url, split, cache, Patience(pause=0.01))


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.views, b.views)


def fits(shards: ShardSet, folder: Path, count: int) -> Cache:
    return Cache(folder, count * max(shard.bytes for shard in shards.shards))


def cached(cache: Cache) -> int:
    return sum(stat.st_size for stat in kept_in(cache.folder).values())


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3-compatible server on this machine; its address."""
    server = pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    running.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def bucket(s3: str, packed: Path, credentials: None) -> str:
    """``packed`` uploaded; the address of the server."""
    import s3fs

    filesystem = s3fs.S3FileSystem(endpoint_url=s3)
    if not filesystem.exists("pictures"):
        filesystem.mkdir("pictures")
        filesystem.put(f"{packed}/", "pictures/", recursive=True)
    return s3


def use_s3_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()  # it would go on with the server it knows


class Proxy:
    """Passes requests on to a server, or does what ``trouble(number, path)`` says with them first.

    Trouble is None, "refuse" (an answer 503), "cut" (half of the body) or "slow".
    """

    def __init__(self, target: str, trouble: Callable[[int, str], str | None]) -> None:
        proxy = self
        self.requests = 0
        host = target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                proxy.requests += 1
                wrong = trouble(proxy.requests, self.path)
                if wrong == "slow":
                    time.sleep(0.3)
                if wrong == "refuse":
                    self.send_error(503)
                    return
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(self.command, self.path, headers=dict(self.headers))
                answer = connection.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("content-length") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if wrong == "cut" else body)
                if wrong == "cut":
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True

            do_GET = do_HEAD = handle_one

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web(packed: Path) -> Iterator[str]:
    """A plain web server of ``packed``, which knows no ranges."""
    with served(packed) as (url, _):
        yield url


def test_s3_gives_the_batches_of_the_disk(
    bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3_at(bucket, monkeypatch)
    split, local = open_split("s3://pictures", "train", Cache(tmp_path, PLENTY)), Split.local(packed, "train")
    assert split.shards.fingerprint == local.shards.fingerprint
    assert_same(stream(split), stream(local))
    assert_same(
        list(central_views(split, SETTING, batch=50, center_fraction=1.0)),
        list(central_views(local, SETTING, batch=50, center_fraction=1.0)),
    )


def test_slow_failing_and_cut_answers_of_s3_change_nothing(
    bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(bucket, lambda number, path: {0: "refuse", 1: "cut", 3: "slow"}.get(number % 5))
    use_s3_at(proxy.url, monkeypatch)
    try:
        assert_same(stream(opened("s3://pictures", Cache(tmp_path, PLENTY))), stream(Split.local(packed, "train")))
        assert proxy.requests > 16  # two each for manifest, table and six shards: some were asked again
    finally:
        proxy.close()


def test_a_web_server_without_ranges_serves_too(
    web: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    def cut_at_first(number: int, path: str) -> str | None:
        asked[path] += 1
        return "cut" if path.endswith("0.tar") and asked[path] <= 4 else None  # a HEAD comes before each GET

    proxy = Proxy(web, cut_at_first)
    try:
        several_a_shard = Patience(chunk=5000, pause=0.01)
        split = open_split(proxy.url, "train", Cache(tmp_path, PLENTY), several_a_shard)
        assert_same(stream(split), stream(Split.local(packed, "train")))
        assert max(asked.values()) > 4  # it was asked for again
    finally:
        proxy.close()


def test_the_cache_stays_within_its_bound_and_gives_the_same_batches(web: str, packed: Path, tmp_path: Path) -> None:
    local = Split.local(packed, "train")
    # Two lanes with windows of one shard, of which a batch may see the end and the next: four of six.
    cache = fits(local.shards, tmp_path, 4)
    split = open_split(web, "train", cache)
    most = 0
    order = Order(split.shards.shard_sizes(), 24, 2, 1, 3)
    batches = []
    for batch in two_views(split, order, Recipe(), SETTING, epochs=3):
        batches.append(batch)
        most = max(most, cached(cache))
    assert 0 < most <= cache.limit < sum(shard.bytes for shard in split.shards.shards)
    assert_same(batches, stream(local, epochs=3))


def test_a_second_start_fetches_nothing_but_the_manifest(web: str, tmp_path: Path) -> None:
    stream(opened(web, Cache(tmp_path, PLENTY)))
    proxy = Proxy(web, lambda number, path: "refuse" if path.endswith(".tar") else None)
    try:
        # The cache is known by the manifest, wherever it came from.
        stream(opened(proxy.url, Cache(tmp_path, PLENTY)))
    finally:
        proxy.close()


def test_processes_share_the_cache_and_leftovers_of_a_killed_one_are_removed(web: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, PLENTY)
    split = open_split(web, "train", cache)
    leftover = split.shards.folder / "train-000001.partial"
    leftover.write_bytes(b"x" * 100)
    results: list[list[Batch]] = []
    threads = [threading.Thread(target=lambda: results.append(stream(split))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(*results)
    assert not leftover.exists() and not list(split.shards.folder.glob("*.partial"))


def refusal(url: str, cache: Cache, split: str = "train") -> str:
    with pytest.raises(UserError) as refused:
        stream(opened(url, cache, split))
    return str(refused.value)


def test_a_shard_that_arrives_wrong_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    tar = broken / "train" / load_split(packed, "train").shards[2].name
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    message = refusal(f"file://{broken}", Cache(tmp_path / "cache", PLENTY))
    assert tar.name in message and "sha256" in message
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_an_answer_that_is_always_cut_ends_with_a_sentence(web: str, tmp_path: Path) -> None:
    proxy = Proxy(web, lambda number, path: "cut" if path.endswith(".tar") else None)
    try:
        assert "cannot be read after 6 attempts" in refusal(proxy.url, Cache(tmp_path, PLENTY))
    finally:
        proxy.close()


def test_an_unfinished_upload_is_named_and_asked_for_again(packed: Path, tmp_path: Path) -> None:
    upload, cache = tmp_path / "upload", Cache(tmp_path / "cache", PLENTY)
    shutil.copytree(packed, upload)
    table = upload / "train" / "samples.npy"
    whole = table.read_bytes()
    table.write_bytes(whole[:-100])
    assert "its upload is not finished" in refusal(f"file://{upload}", cache)
    table.write_bytes(whole)
    assert_same(stream(opened(f"file://{upload}", cache)), stream(Split.local(packed, "train")))


def test_a_cache_folder_with_tars_of_the_user_leaves_them_alone(web: str, packed: Path, tmp_path: Path) -> None:
    mine = [tmp_path / "mine.tar", tmp_path / "deeper" / "train" / "mine.tar"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1_000_000)
    cache = fits(load_split(packed, "train"), tmp_path, 4)
    stream(opened(web, cache), epochs=3)
    assert all(path.stat().st_size == 1_000_000 for path in mine)


def test_what_cannot_be_reached_is_named(web: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, PLENTY)
    assert "nowhere/train" in refusal(f"{web}/nowhere", cache)
    closed = Proxy(web, lambda number, path: None)
    closed.close()
    assert f"{closed.url}/train/manifest.json cannot be read after" in refusal(closed.url, cache)
    assert "strange://" in refusal("strange://bucket", cache)
    down = Proxy(web, lambda number, path: "refuse" if path.endswith("2.tar") else None)
    try:
        assert "train-000002.tar cannot be read after" in refusal(down.url, cache)
    finally:
        down.close()


def test_a_cache_that_is_too_small_is_refused_with_both_numbers(web: str, tmp_path: Path) -> None:
    message = refusal(web, Cache(tmp_path, 1000))
    assert "may hold 1,000" in message and "shuffle_window" in message


def test_closing_ends_a_fetch_that_waits(web: str, tmp_path: Path) -> None:
    proxy = Proxy(web, lambda number, path: "refuse" if path.endswith(".tar") else None)
    try:
        files = open_split(proxy.url, "train", Cache(tmp_path, PLENTY)).open_files()
        asked = proxy.requests
        files.expect([0], [1])
        while proxy.requests == asked:
            time.sleep(0.01)
        started = time.monotonic()
        files.close()
        assert time.monotonic() - started < 10
    finally:
        proxy.close()


@pytest.mark.launch
def test_training_and_probe_from_a_web_server_are_those_from_the_disk(web: str, packed: Path, tmp_path: Path) -> None:
    cache = ["--set", f"simclr.cache={tmp_path / 'cache'}"]
    runs = {name: tmp_path / name for name in ("disk", "web")}
    sources: dict[str, Path | str] = {"disk": packed, "web": web}
    for name, run in runs.items():
        done = pretrain(
            tiny_config(tmp_path), sources[name], run, "--stop-after-steps", 3, *(cache if name == "web" else [])
        )
        assert done.returncode == 0, done.stderr
    assert metrics(runs["disk"]) == metrics(runs["web"])
    done = run_python("eval/linear.py", "--ckpt", runs["web"], "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "on 48 images" in done.stdout
