"""extras/play.py: its numbers are eval_ppl.py's and sample.py's, strangers get nothing, the page works.

The tests at the end drive a real Chromium; they are skipped where there is none.
"""
import base64
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from extras import play
from model import GPT2, student_from
from support.cli import InputError, run_cli
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "demo" / "teacher"
TEXT = 'def f(path):\n    """Zürich, 日本, 🙂"""\n    return open(path).read()\n'
LONG = "".join(f"x{i} = {i * i}\n" for i in range(200))  # about 1,000 tokens; the context is 256
SETTINGS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3, "tokens": 40}


# ------------------------------------------------------------------------------------ fixtures
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What distill.py leaves: a student, who its teacher was, a control; its vocabulary is padded by 8."""
    folder = tmp_path_factory.mktemp("play")
    out, tokenizer = folder / "out", load_tokenizer(TOKENIZER)
    torch.manual_seed(0)
    teacher = GPT2(GPT2.config(vocab_size=4096, context=256, width=32, n_layer=3, n_head=2,
                               eos=tokenizer.eot))
    for parameter in teacher.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # at the usual 0.02 all models are nearly alike
    control = student_from(teacher, [0, 1])
    rows = torch.cat((control.embed.weight.data, 0.5 * torch.ones(8, control.embed.embedding_dim)))
    control.embed.weight = torch.nn.Parameter(rows)
    control.config = replace(control.config, vocab_size=len(rows))
    models = {"teacher": teacher, "out": student_from(teacher, [0, 2]), "out/control": control}
    for name, model in models.items():
        model.save(folder / name)
        tokenizer.save(folder / name)
    (out / "args.json").write_text(json.dumps({"teacher": str(folder / "teacher")}))
    return out


@pytest.fixture(scope="module")
def classroom(run_folder):
    return play.Classroom(play.find_models([str(run_folder)]), "cpu")


@pytest.fixture(scope="module")
def server(classroom):
    with play.listen(0) as server:
        server.classroom = classroom
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env, text=True, capture_output=True,
                          timeout=120)


def written(pieces):
    """{role: text} of what Classroom.write yields."""
    texts = {"teacher": "", "student": ""}
    for piece in pieces:
        texts[piece["role"]] += piece["text"]
    return texts


def softened_kl(logits, role, T):
    """KL(teacher || role) at temperature T, by its definition, in float64."""
    p, q = (torch.tensor(logits[name], dtype=torch.float64).div(T).softmax(0) for name in ("teacher", role))
    return (p * (p / q).log()).sum().item()


def decoded(position):
    return {role: np.frombuffer(base64.b64decode(text), "<f4") for role, text in position["logits"].items()}


def generating():
    return [thread for thread in threading.enumerate() if thread.name == "generate"]


def soon(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ------------------------------------------------------------------------------------ the numbers
def test_totals_are_those_of_eval_ppl(classroom, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = command(ROOT / "eval_ppl.py", *classroom.names.values(), "--data", "text.txt",
                   "--protocol", "pages", "--json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)["results"].values()
    for totals, figures in zip(classroom.score(TEXT)["totals"].values(), expected, strict=True):
        assert totals["perplexity"] == pytest.approx(figures["perplexity_per_token"], rel=1e-5)
        assert totals["loss"] == pytest.approx(math.log(figures["perplexity_per_token"]), rel=1e-5)
        assert totals["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-5)
        assert totals["kl"] == pytest.approx(figures["KL_to_first"], abs=1e-6)
        assert totals["agreement"] == pytest.approx(figures["same_top_1_as_first"])


@torch.no_grad()
def test_a_long_text_is_cut_from_the_left(classroom):
    ids = classroom.tokenizer.encode(LONG)
    scored = classroom.score(LONG)
    assert scored["cut"] == len(ids) - 256 > 0
    assert "".join(token["text"] for token in scored["tokens"]) == classroom.tokenizer.decode(ids[-256:])
    logits = classroom.models["student"](torch.tensor([ids[-257:-1]]))[0]  # the token before is context
    surprise = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-256:]), reduction="none")
    torch.testing.assert_close(torch.tensor(scored["scores"]["student"][0]), surprise, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="no text"):
        classroom.score("")


def test_half_characters_are_shown_as_such(classroom):
    tokens = classroom.score("🙂")["tokens"]
    assert len(tokens) > 1 and all(token["half"] for token in tokens)
    assert "".join(token["text"] for token in tokens).strip() == r"\xf0\x9f\x99\x82"
    assert classroom.score("a \\xf0")["tokens"][0] == {"text": "a", "half": False}


@torch.no_grad()
def test_a_position_has_all_logits(classroom):
    ids = [classroom.tokenizer.eot, *classroom.tokenizer.encode(TEXT)]
    position = classroom.position(TEXT, 7)
    logits = decoded(position)
    for role, model in classroom.models.items():
        expected = model(torch.tensor([ids[:8]]))[0, -1, :4096].numpy()
        np.testing.assert_allclose(logits[role], expected, atol=1e-4)
    assert position["target"] == ids[8]
    shown = [token["id"] for token in position["shown"]]
    assert shown[:15] == logits["teacher"].argsort()[::-1][:15].tolist() and len(set(shown)) == len(shown)
    assert {ids[8], *(values.argmax() for values in logits.values())} <= set(shown)

    score = classroom.score(TEXT)["scores"]  # at T = 1 the softened KL is the one of the text
    assert softened_kl(logits, "student", 1) == pytest.approx(score["student"][1][7], abs=1e-4)
    for index in (-1, len(ids) - 1):
        with pytest.raises(InputError, match=f"no token {index}"):
            classroom.position(TEXT, index)


def test_text_is_that_of_sample_py(classroom, tmp_path):
    settings = {**SETTINGS, "tokens": 270}  # past the end of the window
    teacher, student, _ = classroom.names.values()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    done = command(ROOT / "sample.py", "--model", teacher, "--compare", student, "--prompt", "def f(",
                   *flags, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = written(classroom.write("def f(", settings))
    assert done.stdout == "".join(f"--- {classroom.names[role]}\ndef f({texts[role]}\n\n"
                                  for role in ("teacher", "student"))
    assert all(len(classroom.tokenizer.encode(text)) > 256 for text in texts.values())


def test_writing_waits_for_whole_characters_and_ends_with_the_document(classroom, monkeypatch):
    tokenizer = classroom.tokenizer
    tokens = [*tokenizer.encode("é€"), *tokenizer.encode("€")[:-1], tokenizer.eot, 0]
    monkeypatch.setattr(play, "one_by_one", lambda *args: (token for token in tokens))
    pieces = list(classroom.continuation("student", [0], SETTINGS))
    assert "".join(pieces) == "é€\N{REPLACEMENT CHARACTER}"  # as `decode` of them all
    assert "" in pieces and "€" in pieces
    note, first, *_ = classroom.write(LONG, SETTINGS)
    assert "the last 256" in note["note"] and first["role"] == "teacher"


def test_one_by_one_computes_nothing_unasked():
    class Model:
        calls = 0

        def generate(self, ids, n_tokens, choose):
            for i in range(n_tokens):
                self.calls += 1
                if i == 3:
                    raise RuntimeError("out of memory")
                choose(torch.tensor(i))

    model = Model()
    assert soon(lambda: not generating())
    tokens = play.one_by_one(model, None, 9, lambda logits: logits)
    assert [next(tokens), next(tokens)] == [0, 1]
    time.sleep(0.05)
    assert model.calls == 2
    tokens.close()
    assert soon(lambda: not generating())
    with pytest.raises(RuntimeError, match="out of memory"):
        list(play.one_by_one(Model(), None, 9, lambda logits: logits))
    assert soon(lambda: not generating())


def test_broken_weights_are_named(classroom, monkeypatch):
    broken = student_from(classroom.models["teacher"], [0])
    broken.norm.weight.data.fill_(torch.nan)
    monkeypatch.setitem(classroom.models, "student", broken)
    with pytest.raises(InputError, match="out: its logits are NaN"):
        classroom.score(TEXT)


# ------------------------------------------------------------------------------------ HTTP
def ask(server, path, body=None, **headers):
    """(status, the answer's text) of one request; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Host": f"127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    if body is not None and "Content_Length" not in headers:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    return answer.status, text


def test_the_routes(server, classroom):
    status, page = ask(server, "/")
    assert status == 200 and page == (ROOT / "extras" / "play.html").read_text(encoding="utf-8")
    assert json.loads(ask(server, "/about?x")[1]) == classroom.about()
    assert json.loads(ask(server, "/score", {"text": TEXT})[1]) == classroom.score(TEXT)
    index = json.loads(ask(server, "/position", {"text": TEXT, "index": 3})[1])
    assert index == classroom.position(TEXT, 3)
    lines = ask(server, "/write", {"prompt": "", **SETTINGS})[1].splitlines()
    assert written(map(json.loads, lines)) == written(classroom.write("", SETTINGS))
    assert server.socket.getsockname()[0] == "127.0.0.1"  # nobody outside this machine can connect


def test_who_is_answered(server):
    port = server.server_port
    for name in ("localhost", "LOCALHOST", "[::1]"):
        assert ask(server, "/about", Host=f"{name}:{port}")[0] == 200
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert ask(server, "/score", {"text": "a"}, Origin=origin)[0] == 200
    strangers = ["evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}",
                 f"127.0.0.1.evil.example:{port}", "", None]
    for host in strangers:
        assert ask(server, "/about", Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"):
        assert ask(server, "/score", {"text": "a"}, Origin=origin)[0] == 403, origin
        assert ask(server, "/", Origin=origin)[0] == 403, origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        assert ask(server, "/score", {"text": "a"}, Content_Type=kind)[0] == 415, kind


GOOD = {"prompt": "a", **SETTINGS}


@pytest.mark.parametrize("path, body, status, reason", [
    ("/nothing", None, 404, "no GET /nothing"),
    ("/score", None, 404, "no GET /score"),
    ("/about", {}, 404, "no POST /about"),
    ("/../play.py", None, 404, "no GET"),
    ("/score", b"{", 400, "no JSON"),
    ("/score", b"", 400, "no JSON"),
    ("/score", b"\xff\xfe\xfd", 400, "no JSON"),
    ("/score", b"[" * 200_000, 400, "no JSON"),
    ("/score", ["text"], 400, "JSON object"),
    ("/score", {}, 400, "text has to be text"),
    ("/score", {"text": 1}, 400, "text has to be text"),
    ("/score", {"text": ""}, 400, "there is no text"),
    ("/score", {"text": "a" * 5_000_000}, 413, "262,144 are read"),
    ("/position", {"text": "a", "index": 1}, 400, "there is no token 1: the text has 1"),
    ("/position", {"text": "a", "index": -1}, 400, "index has to be an integer from 0"),
    ("/position", {"text": "a", "index": True}, 400, "index has to be an integer"),
    ("/position", {"text": "a", "index": 0.5}, 400, "index has to be an integer"),
    ("/write", {**GOOD, "temperature": math.nan}, 400, "temperature has to be a number from 0 to 100"),
    ("/write", {**GOOD, "temperature": "1"}, 400, "temperature has to be a number"),
    ("/write", {**GOOD, "top_k": -1}, 400, "top-k has to be an integer from 0"),
    ("/write", {**GOOD, "top_p": 0}, 400, "top-p has to be a number from 0.001 to 1"),
    ("/write", {**GOOD, "tokens": 10**9}, 400, "tokens has to be an integer from 1 to 2,000"),
    ("/write", {**GOOD, "seed": None}, 400, "seed has to be an integer"),
    ("/write", {**GOOD, "seed": 2**70}, 400, "seed has to be an integer"),
], ids=str)
def test_what_is_refused(server, path, body, status, reason, capfd):
    got, text = ask(server, path, body)
    assert got == status and reason in json.loads(text)["error"], text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("header", [{"Content_Length": "x"}, {"Content_Length": "-1"},
                                    {"Transfer_Encoding": "chunked"}])
def test_a_body_says_how_long_it_is(server, header):
    assert ask(server, "/score", b"{}", **header)[0] == 411


def test_surrogates_and_odd_text(server):
    assert ask(server, "/score", b'{"text": "\\ud800 \\u0000 \\u202e"}')[0] == 200


def test_nobody_who_has_gone_is_written_to(server, capfd):
    assert soon(lambda: not generating())
    body = json.dumps({**GOOD, "temperature": 5.0, "top_k": 0, "tokens": 2000}).encode()
    head = (f"POST /write HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/json\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(head.encode() + body)
        while b'"student"' not in client.recv(4096):
            pass
        assert len(generating()) == 2
    assert soon(lambda: not generating())
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(head.encode())  # and no body
    assert ask(server, "/about")[0] == 200
    assert capfd.readouterr().err == ""


def test_two_at_once_do_not_mix(server, classroom):
    requests = [{**GOOD, "prompt": f"def {name}", "seed": seed} for seed, name in enumerate("abcd")]
    alone = [written(classroom.write(request["prompt"], request)) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        scores = [pool.submit(ask, server, "/score", {"text": TEXT}) for _ in range(4)]
        texts = list(pool.map(lambda request: ask(server, "/write", request)[1], requests))
    assert [written(map(json.loads, text.splitlines())) for text in texts] == alone
    assert all(json.loads(score.result()[1]) == classroom.score(TEXT) for score in scores)


# ------------------------------------------------------------------------------------ the command
def test_a_busy_port(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be had .*--port"):
            play.listen(port)
        monkeypatch.setattr(play, "FIRST_PORT", port)
        with play.listen(None) as server:
            assert port < server.server_port < port + play.N_PORTS
    assert f"port {port} cannot be had" in capsys.readouterr().err


def test_which_models(run_folder, tmp_path, tokenizers_dir, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    teacher = str(run_folder.parent / "teacher")
    assert play.find_models([]) == {"teacher": teacher, "student": "out", "control": "out/control"}
    assert play.find_models(["a", "b"]) == {"teacher": "a", "student": "b"}
    with pytest.raises(InputError, match="4 models"):
        play.find_models(["a", "b", "c", "d"])
    with pytest.raises(InputError, match="does not say who its teacher was"):
        play.find_models(["out/control"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run `python distill.py` first"):
        play.find_models([])
    shutil.copytree(run_folder, tmp_path / "other")
    shutil.copy(tokenizers_dir / "gpt2" / "tokenizer.json", tmp_path / "other")
    with pytest.raises(InputError, match="different tokenizers"):
        play.Classroom({"teacher": teacher, "student": "other"}, "cpu")
    shutil.rmtree(tmp_path / "other" / "control")
    assert list(play.find_models(["other"])) == ["teacher", "student"]


def test_the_command_starts_and_ends(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["play.py"])
    with pytest.raises(SystemExit, match="2"):
        run_cli(play.main)
    assert re.fullmatch(r"error: no student in out/.*\n", capsys.readouterr().err)

    def listen():
        """A shell that runs the tests in the background hands down a Ctrl-C that is ignored."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen([sys.executable, "-m", "extras.play", "--port", "0", "--device", "cpu"],
                               preexec_fn=listen, cwd=run_folder.parent, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = [process.stdout.readline() for _ in range(4)]
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)", lines[-1])[1])
    request = json.dumps({**GOOD, "top_k": 0, "temperature": 5, "tokens": 2000}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/write", request, {"Content-Type": "application/json"})
    connection.getresponse().readline()
    process.send_signal(signal.SIGINT)  # in the middle of a text
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr, stdout.strip()) == (0, "", "ended")


# ------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic",
                 "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
                 "no-proxy-server", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, opened and with its first text scored. Afterwards: no error, and nobody else was asked."""
    page = PageInBrowser(browser, f"http://127.0.0.1:{server.server_port}")
    page.look(1240, 900, "light")
    browser.get_log("performance")  # of what was open before, at first the browser's own page
    page.open()
    yield page
    assert [entry["message"] for entry in browser.get_log("browser")] == page.expected_errors
    page.note_requests()
    assert page.requests and all(url.startswith((page.url + "/", "data:")) for url in page.requests)


class PageInBrowser:
    """What a reader does on the page, in words."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        self.requests, self.expected_errors = [], []

    def open(self):
        self.driver.get(self.url)
        self.wait("#opened:not([hidden]) .bar")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, selector, contains=""):
        """Until there is such an element with such a text."""
        found = "return [...document.querySelectorAll(arguments[0])].map(each => each.innerText)"
        assert soon(lambda: any(contains in text for text in self.js(found, selector))), (selector, contains)

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def keys(self, selector, *keys):
        self.find(selector).send_keys(*keys)

    def score(self, text):
        self.js("document.getElementById('text').value = arguments[0]", text)
        self.find("#score").click()

    def colour(self, meaning):
        self.find(f"#colour option[value={meaning}]").click()

    def look(self, width, height, scheme):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def note_requests(self):
        """Add to `requests` what the browser has asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        self.requests += [event["params"]["request"]["url"] for event in events
                          if event["method"] == "Network.requestWillBeSent"]


def test_page_scores_a_text(page, classroom):
    page.score(TEXT)
    page.wait("#tokens", "Z")
    scored = classroom.score(TEXT)
    tokens = page.all(".token")
    assert len(tokens) == len(scored["tokens"])
    assert [token.text for token in tokens if "half" in token.get_attribute("class")] == \
        [token["text"].strip() for token in scored["tokens"] if token["half"]]
    cells = [cell.text for cell in page.all("#totals td")]
    expected = [figure for totals in scored["totals"].values() for figure in totals.values()]
    assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.0051)

    def heats():
        return page.js("return [...document.querySelectorAll('.token')].map(token => "
                       "[token.style.getPropertyValue('--heat'), token.style.getPropertyValue('--c')])")

    surprise, kl = ({role: scored["scores"][role][column] for role in scored["scores"]} for column in (0, 1))
    assert [float(heat) for heat, _ in heats()] == pytest.approx(
        [min(1, x / 8) for x in surprise["student"]], abs=1e-3)
    page.colour("kl")
    assert [float(heat) for heat, _ in heats()] == pytest.approx(
        [min(1, x / 1.5) for x in kl["student"]], abs=1e-3)
    page.colour("teacher")
    better = [s - t for s, t in zip(surprise["student"], surprise["teacher"], strict=True)]
    colours = [f"var(--{'teacher' if x >= 0 else 'student'})" for x in better]
    assert [colour for _, colour in heats()] == colours
    worst = max(range(len(tokens)), key=lambda i: kl["student"][i])
    assert tokens[worst].get_attribute("aria-pressed") == "true"


def test_page_slider_needs_no_request(page, classroom):
    from selenium.webdriver.common.keys import Keys
    text = page.find("#text").get_attribute("value")
    page.all(".token")[11].click()
    page.wait(".token[data-index='11'][aria-pressed=true]")
    page.note_requests()
    asked = len(page.requests)
    page.keys("#temperature", *[Keys.ARROW_RIGHT] * 23)
    assert page.find("#shown-temperature").text == "3.3"

    position = classroom.position(text, 11)
    logits = decoded(position)
    rows = [[cell.text for cell in row.find_elements("css selector", "td")]
            for row in page.all("#divergences tr")[1:]]
    for role, (kl, scaled) in zip(("student", "control"), rows, strict=True):
        assert float(kl) == pytest.approx(softened_kl(logits, role, 3.3), abs=6e-5)
        assert float(scaled) == pytest.approx(3.3**2 * softened_kl(logits, role, 3.3), abs=6e-5)

    p = torch.tensor(logits["teacher"]).double().div(3.3).softmax(0)
    shown = [token["id"] for token in position["shown"]]
    bars = [bar.text for bar in page.all(".bar [data-role=teacher] span")]
    expected = [*p[shown].tolist(), 1 - p[shown].sum().item()]
    assert [float(bar.strip("<%")) / 100 for bar in bars] == pytest.approx(expected, rel=0.06, abs=1e-4)
    assert "dark knowledge" in page.find("#lesson").text
    page.note_requests()
    assert len(page.requests) == asked


def test_page_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys
    page.keys(".token[data-index='0']", Keys.ARROW_RIGHT)
    page.keys(".token[data-index='1']", Keys.ARROW_DOWN)
    active = page.driver.switch_to.active_element
    assert active.rect["y"] > page.all(".token")[1].rect["y"] and "surprised" in page.find("#readout").text
    active.send_keys(Keys.ARROW_UP)
    page.driver.switch_to.active_element.send_keys(Keys.HOME)
    first = page.driver.switch_to.active_element
    assert first.get_attribute("data-index") == "0" and "surprise" in first.get_attribute("aria-label")
    first.send_keys(Keys.ENTER)
    page.wait(".token[data-index='0'][aria-pressed=true]")
    page.wait("#before", "At the start")
    unnamed = page.js("return [...document.querySelectorAll('input, select, textarea')]"
                      ".filter(field => !field.labels.length && !field.ariaLabel).map(field => field.id)")
    assert unnamed == []


def test_page_writes_and_stops(page, classroom):
    defaults = {name: value for name, value in classroom.about()["defaults"].items() if name != "prompt"}
    page.find("#write").click()
    page.wait("#write:not([disabled])")
    prompt = page.find("#prompt").get_attribute("value")
    for role, text in written(classroom.write(prompt, defaults)).items():
        assert page.find(f"#text-{role}").get_attribute("textContent") == \
            prompt + page.js("return visible(arguments[0])", text)

    assert soon(lambda: not generating())
    page.js("for (const [id, value] of [['tokens', 2000], ['temperature', 5], ['top_k', 0]])"
            "document.getElementById('w-' + id).value = value")
    page.find("#write").click()
    assert soon(lambda: len(page.find("#text-student").text) > 50)
    page.find("#stop").click()
    assert soon(lambda: not generating())
    page.wait("#write:not([disabled])")
    assert len(page.find("#text-student").text) < 2000  # all 2,000 tokens have more letters
    assert page.find("#write-message").text == ""


def test_page_says_what_is_wrong(page):
    page.score(LONG)
    page.wait("#text-message", "the first")
    assert len(page.all(".token")) == 256
    page.score("a" * 300_000)
    page.wait("#text-message", "the text is too long")
    page.js("document.getElementById('w-top_p').value = 0")
    page.find("#write").click()
    page.wait("#write-message", "top-p has to be a number from 0.001 to 1")
    page.expected_errors = [f"{page.url}/write - Failed to load resource: the server responded with a status "
                            "of 400 (Bad Request)"]


def test_page_shows_markup_and_invisible_letters_as_text(page):
    markup = '<img src=x onerror="alert(1)">'
    page.score(markup + "\0\u202e\u200b&amp;")
    page.wait("#tokens", "onerror")
    shown = page.find("#tokens").text
    assert shown.startswith(markup + "␀") and shown.endswith("&amp;")
    assert not {"\0", "\u202e", "\u200b"} & set(shown)

    page.js("document.getElementById('prompt').value = arguments[0]", markup)
    page.find("#write").click()
    page.wait("#write:not([disabled])")
    assert page.find("#text-teacher").text.startswith(markup) and not page.all("img")


@pytest.mark.parametrize("width", [360, 1240])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_can_be_read(page, width, scheme):
    """In both schemes and on a phone: no sideways scrolling, and text in contrast to what is behind it."""
    page.look(width, 800, scheme)
    page.find("#score").click()
    page.wait("#opened:not([hidden]) .bar")
    assert page.js("return document.documentElement.scrollWidth") <= width
    ink, paper = page.js("const style = getComputedStyle(document.body);"
                         "return [style.color, style.backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert abs(light[0] - light[1]) > 450 and (light[0] < light[1]) == (scheme == "light")
