"""extras/play.py: its numbers are those of eval_ppl.py and sample.py, strangers get nothing, the page works.

The tests at the end drive a real Chromium; they are skipped where there is none.
"""
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
from pathlib import Path

import pytest
import torch

from extras import play
from model import GPT2, load, student_from
from support.cli import InputError, run_cli

ROOT = Path(__file__).parent.parent
TEXT = 'def f(path):\n    """Zürich, 日本, 🙂"""\n    return open(path).read()\n'
LONG = "".join(f"x{i} = {i * i}\n" for i in range(200))  # about 1,000 tokens; the context is 64
SETTINGS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3, "tokens": 40}
ENDLESS = {"prompt": "a", **SETTINGS, "temperature": 5.0, "top_k": 0, "top_p": 1, "tokens": 100_000}


@pytest.fixture(scope="module")
def run_folder(workshop, tmp_path_factory):
    """What distill.py leaves: a student, who its teacher was, a control; its vocabulary is padded."""
    out = tmp_path_factory.mktemp("play") / "out"
    student_from(load(workshop / "teacher"), [0, 2]).save(out)
    shutil.copy(workshop / "teacher" / "tokenizer.json", out)
    shutil.copytree(workshop / "small", out / "control")
    (out / "args.json").write_text(json.dumps({"teacher": str(workshop / "teacher")}))
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


def written(pieces):
    """{role: text} of what Classroom.write yields."""
    texts = {"teacher": "", "student": ""}
    for piece in pieces:
        texts[piece["role"]] += piece["text"]
    return texts


def soon(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ------------------------------------------------------------------------------------ the numbers
def test_totals_are_those_of_eval_ppl(classroom, tmp_path, run):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = run("eval_ppl.py", *classroom.names.values(), "--data", "text.txt", "--protocol", "pages",
               "--json", "--device", "cpu")
    expected = json.loads(done.stdout)["results"].values()
    for totals, figures in zip(classroom.score(TEXT)["totals"].values(), expected, strict=True):
        assert totals == pytest.approx({
            "perplexity": figures["perplexity_per_token"], "loss": math.log(figures["perplexity_per_token"]),
            "bits_per_byte": figures["bits_per_byte"], "kl": figures["KL_to_first"],
            "agreement": figures["same_top_1_as_first"]}, rel=1e-5, abs=1e-6)


@torch.no_grad()
def test_a_long_text_is_cut_from_the_left(classroom):
    ids = classroom.tokenizer.encode(LONG)
    scored = classroom.score(LONG)
    assert scored["n_cut"] == len(ids) - 64 > 0
    assert scored["cut"] + "".join(token["text"] for token in scored["tokens"]) == LONG
    logits = classroom.models["student"](torch.tensor([ids[-65:-1]]))[0]  # the token before is context
    surprise = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-64:]), reduction="none")
    assert scored["scores"]["student"]["surprise"] == pytest.approx(surprise.tolist(), abs=1e-4, rel=1e-4)


@torch.no_grad()
def test_a_position_gives_exact_probabilities_at_every_temperature(classroom):
    ids = [classroom.tokenizer.eot, *classroom.tokenizer.encode(TEXT)]
    position = classroom.position(TEXT, 7)
    shown = [token["id"] for token in position["shown"]]
    logits = {role: model(torch.tensor([ids[:8]]))[0, -1, :4096].double()
              for role, model in classroom.models.items()}
    for i, T in enumerate(play.TEMPERATURES):
        p = (logits["teacher"] / T).softmax(-1)
        for role, values in logits.items():
            q = (values / T).softmax(-1)
            found = [math.exp(z / T - position["log_sums"][role][i]) for z in position["logits"][role]]
            assert found == pytest.approx(q[shown].tolist(), rel=1e-3)
            assert position["kl"][role][i] == pytest.approx((p * (p / q).log()).sum().item(), abs=2e-5)

    # The teacher's likeliest tokens come first, then the text's and each model's favourite.
    assert shown[:15] == logits["teacher"].topk(15).indices.tolist() and len(set(shown)) == len(shown)
    assert {ids[8], *(values.argmax().item() for values in logits.values())} <= set(shown)
    assert position["target"] == ids[8]


def test_text_is_that_of_sample_py(classroom, run):
    settings = {**SETTINGS, "tokens": 80}  # past the end of the window
    teacher, student, _ = classroom.names.values()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    done = run("sample.py", "--model", teacher, "--compare", student, "--prompt", "def f(", *flags,
               "--device", "cpu")
    texts = written(classroom.write("def f(", settings))
    assert done.stdout == "".join(f"--- {classroom.names[role]}\ndef f({texts[role]}\n\n"
                                  for role in ("teacher", "student"))
    assert all(len(classroom.tokenizer.encode(text)) > 64 for text in texts.values())


def test_writing_waits_for_whole_characters_and_ends_with_the_document(classroom, monkeypatch):
    tokenizer = classroom.tokenizer
    ids = [*tokenizer.encode("é€"), *tokenizer.encode("€")[:-1], tokenizer.eot, 0]
    monkeypatch.setattr(GPT2, "tokens", lambda *args: (torch.tensor([[token]]) for token in ids))
    pieces = list(classroom.continuation("student", [0], SETTINGS))
    assert "".join(pieces) == "é€\N{REPLACEMENT CHARACTER}"  # as `decode` of them all
    assert "" in pieces and "€" in pieces
    note, first, *_ = classroom.write(LONG, SETTINGS)
    assert "the last 64" in note["note"] and first["role"] == "teacher"


def test_models_that_have_diverged(classroom, monkeypatch):
    """A loss of thousands of nats has no perplexity in float64; NaN is not a loss at all."""
    broken = student_from(classroom.models["teacher"], [0])
    monkeypatch.setitem(classroom.models, "student", broken)
    broken.norm.weight.data *= 3000
    totals = classroom.score(TEXT)["totals"]["student"]
    assert totals["perplexity"] == "overflow" and totals["loss"] > 710
    json.dumps([totals, classroom.position(TEXT, 3)], allow_nan=False)
    broken.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="out: its logits are NaN"):
        classroom.score(TEXT)


# ------------------------------------------------------------------------------------ HTTP
def ask(server, path, body=None, headers=()):
    """(status, what the answer's JSON holds) of one request; a body that is not bytes is sent as JSON."""
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    port = server.server_address[1]
    given = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    given |= {} if body is None else {"Content-Length": str(len(body))}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
    for name, value in (given | dict(headers)).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    text = answer.read().decode()
    connection.close()
    if answer.headers["Content-Type"] == "application/x-ndjson":
        return answer.status, [json.loads(line) for line in text.splitlines()]
    return answer.status, text if path == "/" else json.loads(text)


def test_the_routes(server, classroom):
    assert ask(server, "/") == (200, play.PAGE.read_text(encoding="utf-8"))
    assert ask(server, "/about?x") == (200, classroom.about())
    assert ask(server, "/position", {"text": TEXT, "index": 3}) == (200, classroom.position(TEXT, 3))
    assert ask(server, "/score", b'{"text": "\\ud800 \\u0000 \\u202e"}')[0] == 200
    assert server.socket.getsockname()[0] == "127.0.0.1"  # nobody outside this machine can connect

    # Several at once do not mix.
    requests = [{**SETTINGS, "prompt": f"def {name}", "seed": seed} for seed, name in enumerate("abcd")]
    alone = [written(classroom.write(request["prompt"], request)) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        scores = [pool.submit(ask, server, "/score", {"text": TEXT}) for _ in range(4)]
        texts = list(pool.map(lambda request: ask(server, "/write", request)[1], requests))
    assert [written(text) for text in texts] == alone
    assert all(score.result() == (200, classroom.score(TEXT)) for score in scores)


def test_who_is_answered_and_what_is_refused(server, capfd):
    port = server.server_address[1]
    for headers in ({"Host": f"LOCALHOST:{port}"}, {"Origin": f"http://localhost:{port}"}):
        assert ask(server, "/score", {"text": "a"}, headers)[0] == 200
    for name, reason, values in (
            ("Host", "only http", (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.net:{port}", None)),
            ("Origin", "only http", ("http://evil.example", "null", f"https://127.0.0.1:{port}")),
            ("Content-Type", "application/json", ("text/plain", None)),
            ("Content-Length", "too long", ("-1", "1e3", None, "9" * 5000))):
        for value in values:
            status, answer = ask(server, "/score", {"text": "a"}, {name: value})
            assert status == 400 and reason in answer["error"], (name, value)
    assert ask(server, "/about", headers={"Host": "evil.example"})[0] == 400

    good = {"prompt": "a", **SETTINGS}
    for path, body, reason in (
            ("/score", None, "no GET /score"), ("/about", {}, "no POST /about"), ("/play.py", None, "no GET"),
            ("/score", b"\xff\xfe\xfd", "not a JSON"), ("/score", b"[" * 200_000, "not a JSON"),
            ("/score", ["text"], "JSON object"), ("/score", {"text": ""}, "no text"),
            ("/score", {"text": "a" * 300_000}, "at most 262,144 bytes"),
            ("/position", {"text": "a", "index": 1}, "there is no token 1: the text has 1"),
            ("/position", {"text": "a", "index": -1}, "there is no token -1"),
            ("/position", {"text": "a", "index": "one"}, "invalid literal"),
            ("/write", {"prompt": "a"}, "KeyError 'temperature'"),
            ("/write", {**good, "temperature": math.nan}, "temperature nan: must be 0 or more")):
        status, answer = ask(server, path, body)
        assert status == 400 and reason in answer["error"], (path, answer)
    assert capfd.readouterr().err == ""


def test_writing_ends_when_the_reader_has_gone(server, monkeypatch, capfd):
    drawn = []
    draw = play.sample.draw
    monkeypatch.setattr(play.sample, "draw", lambda *args, **more: drawn.append(1) or draw(*args, **more))

    def is_writing():
        before = len(drawn)
        time.sleep(0.2)
        return len(drawn) > before

    body = json.dumps(ENDLESS).encode()
    head = (f"POST /write HTTP/1.1\r\nHost: localhost:{server.server_address[1]}\r\n"
            f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n")
    with socket.create_connection(server.server_address) as client:
        client.sendall(head.encode() + body)
        while b'"student"' not in client.recv(4096):
            pass
        assert is_writing()
    assert soon(lambda: not is_writing())
    with socket.create_connection(server.server_address) as client:
        client.sendall(head.encode())  # and no body
    assert ask(server, "/about")[0] == 200
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------ the command
def test_which_models_and_which_port(run_folder, server, tmp_path, tokenizers_dir, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    teacher = json.loads((run_folder / "args.json").read_text())["teacher"]
    assert play.find_models([]) == {"teacher": teacher, "student": "out", "control": "out/control"}
    assert play.find_models(["a", "b"]) == {"teacher": "a", "student": "b"}
    for given, reason in (("abcd", "4 models"), (["out/control"], "out/control is not the folder of a run")):
        with pytest.raises(InputError, match=reason):
            play.find_models(given)
    shutil.copytree(run_folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "control")
    shutil.copy(tokenizers_dir / "gpt2" / "tokenizer.json", tmp_path / "other")
    found = play.find_models([str(tmp_path / "other")])
    assert list(found) == ["teacher", "student"]
    with pytest.raises(InputError, match="different tokenizers"):
        play.Classroom(found, "cpu")
    with pytest.raises(InputError, match=r"port \d+ is not free .*--port"):
        play.listen(server.server_address[1])


def test_ctrl_c_in_the_middle_of_a_text(run_folder):
    def listen():
        """A shell that runs the tests in the background hands down a Ctrl-C that is ignored."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen([sys.executable, "-m", "extras.play", "--port", "0", "--device", "cpu"],
                               preexec_fn=listen, cwd=run_folder.parent, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = [process.stdout.readline() for _ in range(4)]
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)", lines[-1])[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/write", json.dumps(ENDLESS), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr, stdout.strip()) == (0, "", "ended")


def test_started_as_a_file(run):
    """Python then looks for the project's modules in extras/: one line says how to start it."""
    for name in ("play", "plot", "bench", "figures"):
        done = run(f"extras/{name}.py")
        assert done.returncode and f"python -m extras.{name}" in done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout


# ------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                 "no-proxy-server", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(chromedriver)) as driver:
        yield driver


@pytest.fixture
def page(browser, server):
    """The page, opened and with its first text scored. Afterwards: no error, so no request that failed."""
    page = PageInBrowser(browser, f"http://127.0.0.1:{server.server_address[1]}")
    page.look(1240, "light")
    page.open()
    yield page
    assert [entry["message"] for entry in browser.get_log("browser")] == page.expected_errors


class PageInBrowser:
    """What a reader does on the page, in words."""

    def __init__(self, driver, url):
        self.driver = driver
        self.url = url
        self.expected_errors = []
        self.js = driver.execute_script

    def open(self):
        self.driver.get(self.url)
        self.wait("#opened:not([hidden]) .bar")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def each(self, selector, what="textContent"):
        """A property of all elements, as JavaScript calls it."""
        found = f"return [...document.querySelectorAll(arguments[0])].map(each => each.{what})"
        return self.js(found, selector)

    def wait(self, selector, contains=""):
        """Until there is such an element with such a text."""
        assert soon(lambda: any(contains in text for text in self.each(selector, "innerText"))), selector

    def set(self, name, value, event=""):
        """Set the value of a field, and tell the page so if there is an event."""
        self.js("const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "if (arguments[2]) field.dispatchEvent(new Event(arguments[2]))", name, value, event)

    def open_token(self, index):
        self.find(f".token[data-index='{index}']").click()
        self.wait(f".token[data-index='{index}'][aria-pressed=true]")

    def score(self, text):
        self.set("text", text)
        self.find("#score").click()

    def write(self):
        """Press Write -> what teacher and student have written at the end."""
        self.find("#write").click()
        self.wait("#write:not([disabled])")
        return self.each("#text-teacher, #text-student")

    def look(self, width, scheme):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})


def shown_as_written(page, classroom):
    """What the page has to show after a press on Write, without other settings than at the start."""
    defaults = classroom.about()["defaults"]
    return [defaults["prompt"] + page.js("return visible(arguments[0])", text)
            for text in written(classroom.write(defaults["prompt"], defaults)).values()]


def test_page_scores_a_text(page, classroom):
    page.score(TEXT)
    page.wait("#tokens", "Z")
    scored = classroom.score(TEXT)
    figures = [figure for totals in scored["totals"].values() for figure in totals.values()]
    assert [float(cell) for cell in page.each("#totals td")] == pytest.approx(figures, abs=0.0051)

    def heats():
        return [float(heat) for heat in page.each(".token", "style.getPropertyValue('--heat')")]

    teacher, student = (scored["scores"][role] for role in ("teacher", "student"))
    assert heats() == pytest.approx([min(1, x / 1.5) for x in student["kl"]], abs=1e-3), "it opens on the KL"
    assert page.each(".token", "ariaPressed").index("true") == student["kl"].index(max(student["kl"]))
    page.find("#colour option[value='surprise']").click()
    assert heats() == pytest.approx([min(1, x / 8) for x in student["surprise"]], abs=1e-3)
    page.find("#colour option[value='teacher']").click()
    better = [s >= t for s, t in zip(student["surprise"], teacher["surprise"], strict=True)]
    assert page.each(".token", "style.getPropertyValue('--c')") \
        == [f"var(--{'teacher' if yes else 'student'})" for yes in better]

    # Tokens that are a part of a character are shown as bytes, and said to be bytes.
    assert "".join(page.each(".token.half")).endswith(r"\xf0\x9f\x99\x82")
    assert all("bytes" in label for label in page.each(".token.half", "ariaLabel"))
    page.wait("#bytes", "bytes")
    page.find(".token.half").click()
    page.wait("#readout", "(bytes of a character)")


def test_page_slider_needs_no_request(page, classroom, monkeypatch):
    from selenium.webdriver.common.keys import Keys
    position = classroom.position(page.find("#text").get_attribute("value"), 11)
    page.open_token(11)
    monkeypatch.setattr(play.Page, "do_POST", None)  # another request would be an error
    page.find("#temperature").send_keys(*[Keys.ARROW_RIGHT] * 9)
    assert page.find("#shown-temperature").text == "3.25"

    i = play.TEMPERATURES.index(3.25)
    kl = [factor * position["kl"][role][i] for role in ("student", "control") for factor in (1, 3.25**2)]
    assert [float(cell) for cell in page.each("#divergences td")] == pytest.approx(kl, abs=6e-5)
    assert "dark knowledge" in page.find("#lesson").text

    expected = []
    for role in ("teacher", "student", "control"):
        p = [math.exp(z / 3.25 - position["log_sums"][role][i]) for z in position["logits"][role]]
        expected.append([*p, 1 - sum(p)])
    expected = [p for token in zip(*expected, strict=True) for p in token]  # as the page has them
    lanes = [float(text.strip("<%")) / 100 for text in page.each(".bar [data-role] span", "innerText")]
    assert lanes == pytest.approx(expected, rel=0.06, abs=1e-4)


def test_page_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    def press(key):
        page.driver.switch_to.active_element.send_keys(key)
        return page.driver.switch_to.active_element

    page.js("document.querySelector('.token').focus()")
    second = press(Keys.ARROW_RIGHT)
    assert second.get_attribute("data-index") == "1"
    assert press(Keys.ARROW_DOWN).rect["y"] > second.rect["y"]
    assert "surprised" in page.find("#readout").text
    first = press(Keys.HOME)
    assert first.get_attribute("data-index") == "0" and "surprise" in first.get_attribute("aria-label")
    press(Keys.ENTER)
    page.wait(".token[data-index='0'][aria-pressed=true]")
    page.wait("#before", "At the start")
    assert page.js("return [...document.querySelectorAll('input, select, textarea')]"
                   ".filter(field => !field.labels.length && !field.ariaLabel).map(field => field.id)") == []


def test_page_marks_an_edit_and_keeps_nothing_of_the_text_before(page):
    page.find("#text").send_keys("x")
    page.wait("section:nth-of-type(2) .edited", "edited")
    assert float(page.find("#opened").value_of_css_property("opacity")) < 1
    page.set("text", page.js("return state.text"), "input")
    assert page.find(".edited").text == "", "the text is again the one that is shown"

    page.score("a" * 300_000)  # too long, so nothing can be shown of it
    page.wait("#text-message", "the text is too long")
    assert page.each("#tokens, #totals, #furthest, #readout") == [""] * 4
    assert not page.find("#opened").is_displayed()
    page.score(LONG)
    page.wait("#text-message", "are cut off")
    assert len(page.each(".token")) == 64
    assert page.each("#cut")[0].startswith("x0 = 0\nx1 = 1\n")
    page.score("import os")
    page.wait("#tokens", "import os")
    assert page.each("#cut, #text-message") == ["", ""]


def test_page_writes_and_stops(page, classroom):
    assert page.write() == shown_as_written(page, classroom)
    for name, value in (("tokens", 2000), ("temperature", 5), ("top_k", 0)):
        page.set(f"w-{name}", value)
    page.find("#write").click()
    assert soon(lambda: len(page.find("#text-student").text) > 50)
    page.find("#stop").click()
    page.wait("#write:not([disabled])")
    assert len(page.find("#text-student").text) < 2000  # all 2,000 tokens have more characters
    assert page.find("#write-message").text == ""

    page.set("w-top_p", 0)
    page.find("#write").click()
    page.wait("#write-message", "top-p 0: must be above 0")
    page.expected_errors = [f"{page.url}/write - Failed to load resource: the server responded with a status "
                            "of 400 (Bad Request)"]


def test_page_shows_markup_and_invisible_characters_as_text(page):
    markup = '<img src=x onerror="alert(1)">'
    page.score(markup + "\0\u202e\u200b&amp;")
    page.wait("#tokens", "onerror")
    shown = page.find("#tokens").text
    assert shown.startswith(markup + "␀") and shown.endswith("&amp;")
    assert not {"\0", "\u202e", "\u200b"} & set(shown)
    page.set("prompt", markup)
    assert page.write()[0].startswith(markup) and not page.each("img")


def test_page_fits_and_can_be_read(page):
    """In both schemes and on a phone: no sideways scrolling, and text in contrast to what is behind it."""
    for width, scheme in ((360, "light"), (1240, "dark")):
        page.look(width, scheme)
        assert page.js("return document.documentElement.scrollWidth") <= width
        ink, paper = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in page.js(
            "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"))
        assert abs(sum(ink) - sum(paper)) > 450 and (sum(ink) < sum(paper)) == (scheme == "light")


def test_a_saved_page_shows_what_the_server_shows(page, classroom, run_folder, tmp_path, monkeypatch, capsys):
    """From a file:// address, without a server: every figure of two texts, at several temperatures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(play, "SAVED_TOKENS", 40)
    texts = {"mark.txt": "</script><!-- é 🙂", "long.txt": LONG}
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    flags = [str(run_folder), "--texts", *texts, "--device", "cpu"]
    with pytest.raises(InputError, match="--texts is for a saved page"):
        play.parse_args(flags)
    monkeypatch.setattr(sys, "argv", ["play", *flags, "--save", "page.html"])
    run_cli(play.main)
    assert "long.txt: the page has its first 40 of" in capsys.readouterr().err

    def figures(page):
        found = []
        for T in (1, 0.5, 8):
            page.open_token(2)
            page.set("temperature", T, "input")
            found.append(page.each("#totals td, #divergences td, .lane span, #lesson"))
        return found

    texts["long.txt"] = classroom.tokenizer.decode(classroom.tokenizer.encode(LONG)[:40])
    served = {}
    for name, text in texts.items():
        page.score(text)
        page.wait("#opened:not([hidden]) .bar")
        served[name] = figures(page)
    assert len(served["long.txt"][0]) > 60

    saved = PageInBrowser(page.driver, (tmp_path / "page.html").as_uri())
    saved.open()
    assert "saved page" in saved.find("header").text and not saved.find("#score").is_displayed()
    for name in texts:
        saved.find(f"#choice option[value='{name}']").click()
        saved.wait("#opened:not([hidden]) .bar")
        assert figures(saved) == served[name]
    assert saved.each("#text-teacher, #text-student") == shown_as_written(saved, classroom)


def test_the_saved_page_of_the_demo_is_this_page():
    """docs/page.html: `python -m extras.play demo/teacher out out/control --save docs/page.html`."""
    path = ROOT / "docs" / "page.html"
    page, n_policies = re.subn(r"<meta http-equiv.*>\n", "", path.read_text(encoding="utf-8"))
    page = re.sub(r'(id="saved">)[^<]+<', r"\1null<", page)
    assert n_policies == 1 and path.stat().st_size < 2_000_000
    assert page == play.PAGE.read_text(encoding="utf-8"), "make it again"
