"""A page to play with: what the teacher knows and the student does not, token by token.

    python -m extras.play                        out, its teacher, its control
    python -m extras.play out-2                  another student, its teacher
    python -m extras.play gpt2 distilgpt2        teacher, student, by name
    python -m extras.play out --save page.html   one file without a server
    python -m extras.play out --save page.html --texts a.txt b.txt

Read in this order:
  Classroom          the models, and the three questions of the page: score, position, write
  saved_page         the page with all answers in it, as one file
  Page, Server       HTTP, from the standard library: who is answered, and with what
  find_models, main  the command

The browser gets play.html and nothing else. That page asks only this server, which remembers nothing between
two requests and listens on 127.0.0.1 alone. If it runs on another machine, forward the port with the same
number at both ends: `ssh -L 8000:127.0.0.1:8000 machine`.

Shapes: L tokens, V tokens in the vocabulary, n temperatures. Surprise and KL are in nats.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.play`")

import codecs
import functools
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import torch
from torch.nn import functional as F

import sample
from data import load_tokenizer
from model import load
from support.cli import InputError, checked, new_parser, note, reading, run_cli, user_path
from support.files import read_object, replaced
from support.ranks import pick_device
from support.scoring import exp, score

ROLES = ("teacher", "student", "control")
PAGE = Path(__file__).with_name("play.html")
N_SHOWN = 15  # the teacher's likeliest tokens that a position shows
TEMPERATURES = [0.5 + 0.25 * i for i in range(31)]  # of the slider: 0.5 to 8

MAX_BYTES = 256 * 1024  # of a request: a text far longer than any context
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'")  # load nothing, ask only this server
SAFETY = {"Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'", "Cache-Control": "no-store",
          "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

WRITING = ("temperature", "top_k", "top_p", "seed", "tokens")  # settings of sample.py that the page has
QUESTIONS = {  # that the page asks: {path: {field of the JSON object that it sends: what makes its value}}
    "/score": {"text": str},
    "/position": {"text": str, "index": int},
    "/write": dict.fromkeys(["prompt", *WRITING], str),
}

TEXTS = {  # to begin with: short, as a saved page holds all that can be asked about them
    "reading settings": '''def read_config(path):
    """Read a file of settings, one on each line."""
    result = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            key, value = line.split("=", 1)
            if not isinstance(value, str):
                raise TypeError("value must be a string")
            result[key.strip()] = value.strip()
    return result
''',
    "a class": '''class Queue:
    """First in, first out."""

    def __init__(self, items=()):
        self.items = list(items)

    def put(self, item):
        self.items.append(item)

    def get(self):
        if not self.items:
            raise IndexError("the queue is empty")
        return self.items.pop(0)
''',
    "plain English": """The ferry left at seven. Nobody on the pier had seen the dog jump, but an hour later
it was asleep in the captain's chair, and the lights of the harbour were far behind them. \N{HOT BEVERAGE}
""",
}


# ----------------------------------------------------------------------------------------- the models
class Classroom:
    """Teacher, student and perhaps a control, all with one tokenizer."""

    def __init__(self, names, device):
        """`names`: {role: name of a model}, the teacher first."""
        self.names = names
        self.device = device
        # Requests wait for each other: PyTorch uses all cores, and there is memory for one text.
        self.lock = threading.Lock()

        tokenizers = {role: load_tokenizer(name) for role, name in names.items()}
        self.tokenizer = tokenizers["teacher"]
        for role, tokenizer in tokenizers.items():
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise InputError(f"{names[role]} and {names['teacher']} have different tokenizers, so they "
                                 "cannot be compared token by token: name models of one family")

        self.models = {role: load(name, device) for role, name in names.items()}
        self.context = min(model.context for model in self.models.values())

    def about(self):
        """What the page needs at the start. The default settings for writing are those of sample.py."""
        models = [{"role": role, "name": name, "parameters": self.models[role].num_parameters()}
                  for role, name in self.names.items()]
        defaults = vars(sample.parse_args([]))
        return {"models": models, "context": self.context, "vocab_size": self.tokenizer.vocab_size,
                "max_bytes": MAX_BYTES, "temperatures": TEMPERATURES, "texts": TEXTS,
                "defaults": {name: defaults[name] for name in ["prompt", *WRITING]}}

    def window(self, text):
        """A text -> (ids that the models see, ids that were cut off in front of them).

        The first id that they see is only context: <|endoftext|>, which stands before every document in
        training, so that the first token of the text is scored, too. Of a long text the end is kept.
        """
        ids = [self.tokenizer.eot, *self.tokenizer.encode(text)]
        if len(ids) == 1:
            raise InputError("there is no text")
        n_cut = max(0, len(ids) - 1 - self.context)
        return ids[n_cut:], ids[1:n_cut + 1]

    def show(self, token):
        """A token for the page. `half`: its bytes are only a part of a character, written as \\xc3."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return {"text": raw.decode("utf-8"), "half": False}
        except UnicodeDecodeError:
            return {"text": raw.decode("utf-8", "backslashreplace"), "half": True}

    def score(self, text):
        """How surprised each model was by each token of a text, and the figures of the whole text."""
        ids, cut = self.window(text)
        inputs = torch.tensor([ids[:-1]], device=self.device)  # (1, L)
        targets = torch.tensor(ids[1:], device=self.device)[:, None]  # (L, 1): sums over one token each
        scores = score([*self.models.values()], inputs, targets, self.tokenizer.vocab_size)

        n_bytes = len(self.tokenizer.decode_bytes(ids[1:]))
        columns, totals = {}, {}
        for (role, name), sums in zip(self.names.items(), scores, strict=True):
            nll, kl, agree, *_ = sums  # each (L)
            if not (nll.isfinite() & kl.isfinite()).all():
                raise InputError(f"{name}: its logits are NaN or infinite: its weights are broken")
            columns[role] = {"surprise": nll.tolist(), "kl": kl.tolist(), "same": agree.tolist()}
            loss = nll.mean().item()
            totals[role] = {
                "loss": loss, "perplexity": exp(loss) if math.isfinite(exp(loss)) else "overflow",
                "bits_per_byte": nll.sum().item() / math.log(2) / n_bytes,
                "kl": kl.mean().item(), "agreement": agree.mean().item()}
        return {"tokens": [self.show(token) for token in ids[1:]], "scores": columns, "totals": totals,
                "n_cut": len(cut), "cut": self.tokenizer.decode(cut)}

    @torch.no_grad()
    def position(self, text, index):
        """The distributions with which the models predict token `index` of a text.

        `shown` are the teacher's likeliest tokens, then the text's own and each model's favourite. The page
        gets their logits, and of all other tokens only what they add up to: `log_sums`, the logarithm of
        the sum of exp(logit / T) over the whole vocabulary at each of TEMPERATURES. So it has the exact
        probability of each token shown, exp(logit / T - log_sum), without asking again.
        """
        ids, _ = self.window(text)
        if not 0 <= index < len(ids) - 1:
            raise InputError(f"there is no token {index}: the text has {len(ids) - 1}")
        before = torch.tensor([ids[:index + 1]], device=self.device)  # (1, L)
        T = torch.tensor(TEMPERATURES, dtype=torch.float64)[:, None]  # (n, 1)

        logits = {}
        answer = {"log_sums": {}, "kl": {}}
        for role, model in self.models.items():
            every = F.linear(model.hidden(before)[0, -1], model.head_weight)
            logits[role] = every[:self.tokenizer.vocab_size].cpu().double()  # without rows that only pad
            log_q = (logits[role] / T).log_softmax(-1)  # (n, V)
            if role == "teacher":
                log_p = log_q
            answer["kl"][role] = rounded((log_p.exp() * (log_p - log_q)).sum(-1))
            answer["log_sums"][role] = rounded((logits[role] / T).logsumexp(-1))

        likeliest = logits["teacher"].topk(min(N_SHOWN, self.tokenizer.vocab_size)).indices.tolist()
        favourites = [values.argmax().item() for values in logits.values()]
        shown = [*dict.fromkeys([*likeliest, ids[index + 1], *favourites])]
        answer["logits"] = {role: rounded(values[shown]) for role, values in logits.items()}
        return {"target": ids[index + 1], "shown": [{"id": token, **self.show(token)} for token in shown],
                **answer}

    def write(self, prompt, settings):
        """Yield what teacher and student write after a prompt, in turns, a token of each at a time."""
        ids = self.tokenizer.encode(prompt, allow_special=True) or [self.tokenizer.eot]
        if len(ids) >= self.context:
            yield {"note": f"The prompt has {len(ids)} tokens; the models see the last {self.context} at a "
                           "time."}
        texts = {role: self.continuation(role, ids, settings) for role in ROLES[:2]}
        while texts:
            for role in list(texts):
                with self.lock:
                    text = next(texts[role], None)
                if text is None:
                    del texts[role]
                yield {"role": role, "text": text or "", "done": text is None}

    def continuation(self, role, ids, settings):
        """Yield the text that sample.py prints for these settings, in pieces that are whole characters."""
        generator = torch.Generator(self.device).manual_seed(settings["seed"])
        choose = functools.partial(sample.draw, temperature=settings["temperature"], top_k=settings["top_k"],
                                   top_p=settings["top_p"], generator=generator)
        prompt = torch.tensor([ids], device=self.device)

        # A token may end within a character; the decoder keeps such bytes until the others have come.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self.models[role].tokens(prompt, settings["tokens"], choose):
            if token.item() == self.tokenizer.eot:
                break
            yield decoder.decode(self.tokenizer.decode_bytes([token.item()]))
        yield decoder.decode(b"", final=True)


def rounded(values):
    """A tensor as a list of numbers with five decimals: more would only make the page larger."""
    return [round(value, 5) for value in values.tolist()]


# ----------------------------------------------------------------------------------------- one file
SAVED_TOKENS = 200  # of each text; a position takes about 2.5 kB


def saved_page(classroom, texts):
    """play.html with the answers to all that can be asked about `texts`, {title: text}."""
    kept = {}  # {title: text}
    answers = {}  # {text: what the page may ask about it}
    for title, text in texts.items():
        ids = classroom.tokenizer.encode(text)
        longest = min(SAVED_TOKENS, classroom.context)
        if len(ids) > longest:
            note(f"{title}: the page has its first {longest} of {len(ids)} tokens")
            text = classroom.tokenizer.decode(ids[:longest])
        scored = classroom.score(text)
        positions = [classroom.position(text, i) for i in range(len(scored["tokens"]))]
        kept[title] = text
        answers[text] = {"scored": scored, "positions": positions}

    about = {**classroom.about(), "texts": kept}
    written = {"teacher": "", "student": ""}
    for piece in classroom.write(about["defaults"]["prompt"], about["defaults"]):
        if "role" in piece:
            written[piece["role"]] += piece["text"]

    saved = {"about": about, "answers": answers, "written": written}
    data = json.dumps(saved, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("<title>", f"{policy}\n<title>", 1)
    return page.replace('id="saved">null<', f'id="saved">{data}<', 1)


def save_page(classroom, path, files):
    """Write saved_page to `path`, with the texts of `files`, or with TEXTS."""
    texts = {}
    for name in files or ():
        with reading(name, "a text in UTF-8"):
            texts[Path(name).name] = Path(name).read_text(encoding="utf-8")
    with replaced(path) as temporary:
        temporary.write_text(saved_page(classroom, texts or TEXTS), encoding="utf-8")
    print(f"{path}: open it in a browser")


# ----------------------------------------------------------------------------------------- HTTP
class Page(BaseHTTPRequestHandler):
    """One request. In HTTP/1.0 the end of the connection is the end of an answer, also of a stream."""
    timeout = 60  # seconds that a browser may neither send nor receive
    disable_nagle_algorithm = True  # show each token as soon as it is there

    def do_GET(self):
        """Answer, or say in one line of JSON why not."""
        try:
            self.check_sender()
            self.answer(self.path.partition("?")[0])
        except InputError as error:
            self.send_json({"error": str(error)}, 400)

    do_POST = do_GET

    def check_sender(self):
        """Answer only the page that came from here.

        Any page on the Web may send requests to 127.0.0.1, and a page whose own name points there (DNS
        rebinding) could read the answers. But it cannot hide its name, which is in Host and in Origin.
        """
        port = self.server.server_address[1]
        hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.lower() not in hosts or origin and origin not in {f"http://{name}" for name in hosts}:
            raise InputError(f"only http://127.0.0.1:{port} is answered, not {(origin or host)[:99]!r}")
        # A form on a foreign page can post without asking first, but not as JSON.
        if self.command == "POST" and self.headers.get_content_type() != "application/json":
            raise InputError("a request has to be application/json")

    def answer(self, path):
        classroom = self.server.classroom
        if self.command == "POST" and path in QUESTIONS:
            request = self.read_request(QUESTIONS[path])
            if path == "/write":
                self.send_text(request)
            else:
                ask = {"/score": classroom.score, "/position": classroom.position}[path]
                with classroom.lock:
                    answer = ask(**request)
                self.send_json(answer)
        elif self.command == "GET" and path == "/about":
            self.send_json(classroom.about())
        elif self.command == "GET" and path == "/":
            self.send_head(200, "text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())  # read again, in case you edit it
        else:
            raise InputError(f"there is no {self.command} {path[:99]} here")

    def read_request(self, fields):
        """What was sent, a JSON object with these `fields`."""
        length = self.headers.get("Content-Length", "none")
        if not length.isdecimal() or len(length) > 15 or int(length) > MAX_BYTES:
            raise InputError(f"the text is too long: at most {MAX_BYTES:,} bytes are read")
        body = self.rfile.read(int(length))
        with reading("the request", "a JSON object with what is needed"):
            request = json.loads(body)
            return {name: kind(request[name]) for name, kind in fields.items()}

    def send_text(self, request):
        """A line of JSON for each token. If the browser has gone, sending fails, which ends the text."""
        # The settings are checked as if they were flags of sample.py.
        flags = [f"--{name.replace('_', '-')}={request[name]}" for name in WRITING]
        pieces = self.server.classroom.write(request["prompt"], vars(sample.parse_args(flags)))
        self.send_head(200, "application/x-ndjson")
        try:
            for piece in pieces:
                self.wfile.write(json.dumps(piece).encode() + b"\n")
        except InputError as error:  # too late for another status
            self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")

    def send_json(self, answer, status=200):
        self.send_head(status, "application/json")
        self.wfile.write(json.dumps(answer, allow_nan=False).encode())

    def send_head(self, status, kind):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **SAFETY}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        """Print nothing for a request."""


class Server(ThreadingTCPServer):
    """A thread for each request; `classroom` answers them all. HTTPServer would ask the DNS for a name."""
    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # those: the client has gone
            super().handle_error(request, client_address)


def listen(port):
    """A server that only this machine can reach; port 0: any free one."""
    try:
        return Server(("127.0.0.1", port), Page)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"port {port} is not free ({reason}): name another one with --port, or 0") from error


# ----------------------------------------------------------------------------------------- the command
def find_models(given):
    """{role: name}: the models named, or those of one run: a student, its teacher, its control if saved."""
    if len(given) > len(ROLES):
        raise InputError(f"{len(given)} models, but there are three places: teacher, student, control")
    if len(given) >= 2:
        return dict(zip(ROLES, given, strict=False))

    student = given[0] if given else "out"
    teacher = read_object(Path(student, "args.json")).get("teacher", "none")
    if teacher == "none":
        raise InputError(f"{student} is not the folder of a run that has a teacher: run `python distill.py` "
                         "first, or name two models, as in `python -m extras.play gpt2 distilgpt2`")
    names = {"teacher": teacher, "student": student}
    control = Path(student, "control")
    if (control / "model.safetensors").is_file():
        names["control"] = str(control)
    return names


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.play [MODEL ...] [options]")
    add = parser.add_argument_group("models").add_argument
    add("models", nargs="*", type=user_path, metavar="MODEL",
        help="folders, or names on the Hub, with one tokenizer: teacher, student, control; a student alone "
             "brings the teacher and the control of its run; without any name it is out")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that works here")

    add = parser.add_argument_group("page").add_argument
    add("--port", type=checked(int, "0 to 65535", lambda n: 0 <= n < 2**16), default=8000, metavar="N",
        help="where the page is served; 0: any free port")
    add("--save", type=user_path, metavar="FILE",
        help="instead of serving the page, write it into one .html file that works without a server")
    add("--texts", nargs="+", type=user_path, metavar="FILE",
        help=f"texts for the saved page, the first {SAVED_TOKENS} tokens of each (default: three short ones)")
    args = parser.parse_args(argv)
    if args.texts and not args.save:
        raise InputError("--texts is for a saved page: add --save FILE")
    return args


def main():
    args = parse_args()
    names = find_models(args.models)
    if args.save:
        save_page(Classroom(names, pick_device(args.device)), args.save, args.texts)
        return

    with listen(args.port) as server:  # before the models, as it fails sooner
        server.classroom = Classroom(names, pick_device(args.device))
        for role, name in names.items():
            print(f"{role}: {name}")
        print(f"open http://127.0.0.1:{server.server_address[1]} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
            # From now on nothing is computed: Python aborts if it ends while a thread is inside PyTorch.
            server.classroom.lock.acquire()


if __name__ == "__main__":
    run_cli(main)
