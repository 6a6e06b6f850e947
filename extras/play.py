"""A page to play with: what the teacher knows and the student does not, token by token.

    python -m extras.play                    out, its teacher, its control
    python -m extras.play out-2              another student, and its teacher
    python -m extras.play gpt2 distilgpt2    teacher, student, by name

Read in this order:
  Classroom          the models, and the three things that the page asks of them: score, position, write
  one_by_one         model.generate turned inside out, so that text comes token by token
  Page, Server       HTTP, from the standard library; who is answered, and how much is read
  find_models, main  the command

play.html, beside this file, is all that the browser gets; it asks nobody but this server, and the server
remembers nothing between two requests. It listens on 127.0.0.1 alone. For a machine elsewhere, forward the
port: `ssh -L 8000:127.0.0.1:8000 machine`, with one number at both ends.
Shapes: L tokens, C width, V tokens in the vocabulary. Surprise and KL are in nats.
"""
import base64
import codecs
import contextlib
import functools
import itertools
import json
import math
import os
import queue
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch.nn import functional as F

import sample
from model import load
from support.cli import InputError, checked, new_parser, pick_device, run_cli, user_path
from support.tokenizer import load_tokenizer

ROLES = ("teacher", "student", "control")
CHUNK = 128  # tokens whose logits exist at a time
N_SHOWN = 15  # bars of a position, the teacher's likeliest tokens

FIRST_PORT, N_PORTS = 8000, 20
MAX_BYTES = 256 * 1024  # of a request: a text far longer than any context
MAX_DRAINED = 64 * MAX_BYTES  # of one that is refused; see read_body
PATIENCE = 60  # seconds that a client may neither send nor receive

WRITING = {  # setting of sample.py: its type, lowest and highest value
    "temperature": (float, 0, 100), "top_k": (int, 0, 10**6), "top_p": (float, 0.001, 1),
    "seed": (int, 0, 2**53 - 1), "tokens": (int, 1, 2000)}  # a browser's integers end at 2**53


# ----------------------------------------------------------------------------------------- the models
def one_at_a_time(method):
    """PyTorch has all cores to itself, and memory for one text. No two requests share anything else."""
    @functools.wraps(method)
    def alone(self, *args):
        with self.lock:
            return method(self, *args)
    return alone


class Classroom:
    """Teacher, student and perhaps a control, all of one tokenizer."""

    def __init__(self, names, device):
        """`names`: {role: name of a model}, the teacher first."""
        self.names = names
        self.device = device
        self.lock = threading.Lock()  # whoever computes holds it: for a text, or for a token that is written

        tokenizers = {role: load_tokenizer(name) for role, name in names.items()}
        self.tokenizer = tokenizers["teacher"]
        for role, tokenizer in tokenizers.items():
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise InputError(f"{names[role]} and {names['teacher']} have different tokenizers, so "
                                 "no token could be asked of both: name models of one family")

        self.models = {role: load(name, device) for role, name in names.items()}
        self.context = min(model.context for model in self.models.values())

    def about(self):
        """What the page shows before anything is asked; the defaults of writing are sample.py's."""
        models = [{"role": role, "name": name, "parameters": self.models[role].num_parameters()}
                  for role, name in self.names.items()]
        defaults = vars(sample.parse_args([]))
        return {"models": models, "context": self.context, "vocab_size": self.tokenizer.vocab_size,
                "max_bytes": MAX_BYTES, "defaults": {name: defaults[name] for name in ["prompt", *WRITING]}}

    def window(self, text):
        """(ids, how many tokens of the text were cut): what the models see. The first id is only context.

        It is <|endoftext|>, which stands before every document in training, so that the first token of
        the text is scored, too. Of a text that is too long the end is kept.
        """
        ids = [self.tokenizer.eot, *self.tokenizer.encode(text)]
        if len(ids) == 1:
            raise InputError("there is no text")
        n_cut = max(0, len(ids) - 1 - self.context)
        return ids[n_cut:], n_cut

    def show(self, token):
        """A token for the page. Bytes that are half a character are written as \\xc3."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return {"text": raw.decode("utf-8"), "half": False}
        except UnicodeDecodeError:
            return {"text": raw.decode("utf-8", "backslashreplace"), "half": True}

    @one_at_a_time
    def score(self, text):
        """How each model did at each token of a text, and over all of them."""
        ids, n_cut = self.window(text)
        scores = token_scores(self.models, ids, self.tokenizer.vocab_size, self.device)
        for role, columns in scores.items():
            if not columns.isfinite().all():
                raise InputError(f"{self.names[role]}: its logits are NaN or infinite: its weights are "
                                 "broken")

        n_bytes = len(self.tokenizer.decode_bytes(ids[1:]))
        return {"tokens": [self.show(token) for token in ids[1:]], "cut": n_cut,
                "scores": {role: columns.tolist() for role, columns in scores.items()},
                "totals": {role: totals(columns, n_bytes) for role, columns in scores.items()}}

    @one_at_a_time
    @torch.no_grad()
    def position(self, text, index):
        """All logits with which the models predict token `index` of a text, as float32 in base64.

        With these the browser has the exact distribution at any temperature and asks no more.
        `shown`: the teacher's likeliest tokens, then the text's and each model's favourite.
        """
        ids, _ = self.window(text)
        if not 0 <= index < len(ids) - 1:
            raise InputError(f"there is no token {index}: the text has {len(ids) - 1}")
        before = torch.tensor([ids[:index + 1]], device=self.device)  # (1, L)

        logits = {}
        for role, model in self.models.items():
            last = model.hidden(before)[0, -1]  # (C)
            every = F.linear(last, model.head_weight)  # the rows that pad a vocabulary, too
            logits[role] = every[:self.tokenizer.vocab_size].float().cpu()  # (V)

        shown = logits["teacher"].topk(min(N_SHOWN, self.tokenizer.vocab_size)).indices.tolist()
        extra = [ids[index + 1], *(values.argmax().item() for values in logits.values())]
        shown += [token for token in dict.fromkeys(extra) if token not in shown]
        return {"target": ids[index + 1], "n_likeliest": N_SHOWN,
                "shown": [{"id": token, **self.show(token)} for token in shown],
                "logits": {role: base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
                           for role, values in logits.items()}}

    def write(self, prompt, settings):
        """Yield what teacher and student write after a prompt, in turns, a token of each at a time."""
        ids = self.tokenizer.encode(prompt, allow_special=True) or [self.tokenizer.eot]
        if len(ids) >= self.context:
            yield {"note": f"The prompt has {len(ids)} tokens; the models see the last {self.context} at a "
                           "time."}
        with contextlib.ExitStack() as stack:
            texts = {role: self.continuation(role, ids, settings) for role in ROLES[:2]}
            for text in texts.values():
                stack.enter_context(contextlib.closing(text))
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
        tokens = one_by_one(self.models[role], torch.tensor([ids], device=self.device),
                            settings["tokens"], choose)

        # A token may end within a character; the decoder keeps such bytes until the others have come.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.closing(tokens):
            for token in itertools.takewhile(lambda token: token != self.tokenizer.eot, tokens):
                yield decoder.decode(self.tokenizer.decode_bytes([token]))
        yield decoder.decode(b"", final=True)


@torch.no_grad()
def token_scores(models, ids, vocab_size, device):
    """{role: (3, L)}: surprise, KL(teacher || model), 1 where the favourite is the teacher's, at ids[1:].

    As in eval_ppl.py: the surprise is over all rows of a model, those that pad its vocabulary, too; the KL
    is over the `vocab_size` tokens that all models have.
    """
    inputs = torch.tensor([ids[:-1]], device=device)  # (1, L)
    targets = torch.tensor(ids[1:], device=device)  # (L)
    hidden = {role: model.hidden(inputs)[0] for role, model in models.items()}  # each (L, C)

    columns = {role: [] for role in models}
    for rows in torch.arange(len(targets), device=device).split(CHUNK):
        for role, model in models.items():
            logits = F.linear(hidden[role][rows], model.head_weight).float()  # (chunk, V)
            surprise = F.cross_entropy(logits, targets[rows], reduction="none")
            favourite = logits.argmax(-1)
            log_q = logits[:, :vocab_size].log_softmax(-1)
            if role == "teacher":
                log_p, teachers_favourite = log_q, favourite
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            columns[role].append(torch.stack((surprise, kl, favourite == teachers_favourite)))
    return {role: torch.cat(chunks, 1).cpu() for role, chunks in columns.items()}


def totals(columns, n_bytes):
    """Columns (3, L) of one model -> the figures that eval_ppl.py has for a text."""
    nll = columns[0].double().sum().item()
    loss, kl, agreement = columns.double().mean(1).tolist()
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nll / math.log(2) / n_bytes,
            "kl": kl, "agreement": agreement}


class Stopped(Exception):
    """Nobody wants the next token."""


def one_by_one(model, ids, n_tokens, choose):
    """Yield the tokens that model.generate would append; nothing is computed before it is asked for.

    generate runs in a thread of its own and stops inside `choose` until the next token is wanted. So
    there is one way to generate, with its cache and its window, and closing this iterator ends it.
    """
    wanted, chosen = queue.SimpleQueue(), queue.SimpleQueue()

    def choose_and_wait(logits):
        token = choose(logits)
        chosen.put(token.item())
        if not wanted.get():
            raise Stopped
        return token

    def generate():
        try:
            if wanted.get():
                model.generate(ids, n_tokens, choose_and_wait)
        except Stopped:
            pass
        except Exception as error:  # whoever waits for a token has to hear of it
            chosen.put(error)

    threading.Thread(target=generate, name="generate", daemon=True).start()
    try:
        for _ in range(n_tokens):
            wanted.put(True)
            token = chosen.get()
            if isinstance(token, Exception):
                raise token
            yield token
    finally:
        wanted.put(False)


# ----------------------------------------------------------------------------------------- HTTP
class Refused(Exception):
    """A request that gets no answer: status, and one line that says why."""


def field(request, name, kind, low=None, high=None):
    """A checked field of a request."""
    value = request.get(name)
    if kind is str:
        if not isinstance(value, str):
            raise InputError(f"{name} has to be text")
        return value
    numbers = (int, float) if kind is float else int
    # True is an int, too, and NaN is not between anything.
    if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
        raise InputError(f"{name.replace('_', '-')} has to be a{'n integer' if kind is int else ' number'} "
                         f"from {low:,} to {high:,}")
    return value


class Page(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: the end of the connection is the end of an answer, of a stream as well."""
    timeout = PATIENCE
    disable_nagle_algorithm = True  # a token should be on the screen when it is there

    def do_GET(self):
        self.reply({"/": self.send_page, "/about": self.send_about})

    def do_POST(self):
        self.reply({"/score": self.send_scores, "/position": self.send_position, "/write": self.send_text})

    def reply(self, routes):
        """Answer from `routes`, or say in one line of JSON why not."""
        path = self.path.partition("?")[0]
        try:
            body = self.read_body()
            self.check_sender()
            if path not in routes:
                raise Refused(404, f"there is no {self.command} {path[:99]} here")
            if self.command == "POST":
                routes[path](self.parse(body))
            else:
                routes[path]()
        except Refused as refused:
            status, reason = refused.args
            self.send_json({"error": reason}, status)
        except InputError as error:
            self.send_json({"error": str(error)}, 400)

    def read_body(self):
        """The bytes of the request; those of one that is too long are read and forgotten.

        A connection that is closed while bytes are still coming is reset, and the browser shows its own
        error instead of ours.
        """
        try:
            length = int(self.headers.get("Content-Length", 0))
        except ValueError:
            length = -1
        if length < 0 or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a request needs a Content-Length")
        if length <= MAX_BYTES:
            return self.rfile.read(length)

        left = min(length, MAX_DRAINED)
        while left and (block := self.rfile.read(min(left, MAX_BYTES))):
            left -= len(block)
        raise Refused(413, f"the text is too long: {length:,} bytes with its envelope, and {MAX_BYTES:,} "
                           "are read; send the part that matters")

    def check_sender(self):
        """Only a page that came from here is answered.

        Any page on the Web may send requests to 127.0.0.1, and one that lets its own name point there
        (DNS rebinding) could read the answers. It cannot hide its name: that is in Host, and in Origin.
        """
        port = self.server.server_port
        hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if port == 80:
            hosts |= {"127.0.0.1", "localhost", "[::1]"}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.lower() not in hosts or origin and origin not in {f"http://{name}" for name in hosts}:
            raise Refused(403, f"only http://127.0.0.1:{port} is answered, not {(origin or host)[:99]!r}")
        # A form of a foreign page can post without asking, but not as JSON.
        if self.command == "POST" and self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request has to be application/json")

    def parse(self, body):
        """The JSON object of a request."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"this is no JSON: {str(error)[:99]}") from error
        if not isinstance(request, dict):
            raise InputError("a request has to be a JSON object")
        return request

    def send_page(self):
        page = Path(__file__).with_name("play.html").read_bytes()  # anew, for whoever edits it meanwhile
        self.send_head(200, "text/html; charset=utf-8", len(page))
        self.wfile.write(page)

    def send_about(self):
        self.send_json(self.server.classroom.about())

    def send_scores(self, request):
        self.send_json(self.server.classroom.score(field(request, "text", str)))

    def send_position(self, request):
        text, index = field(request, "text", str), field(request, "index", int, 0, MAX_BYTES)
        self.send_json(self.server.classroom.position(text, index))

    def send_text(self, request):
        """A line of JSON for each token. When the browser has gone, sending fails, and that ends it all."""
        prompt = field(request, "prompt", str)
        settings = {name: field(request, name, *bounds) for name, bounds in WRITING.items()}
        self.send_head(200, "application/x-ndjson")
        with contextlib.closing(self.server.classroom.write(prompt, settings)) as pieces:
            try:
                for piece in pieces:
                    self.wfile.write(json.dumps(piece).encode() + b"\n")
            except InputError as error:  # too late for another status
                self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")

    def send_json(self, answer, status=200):
        body = json.dumps(answer).encode()
        self.send_head(status, "application/json", len(body))
        self.wfile.write(body)

    def send_head(self, status, kind, length=None):
        """Headers. The policy lets the page load nothing and talk to nobody, except to this server."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy",
                         "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                         "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                         "frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, *args):
        """The terminal stays as it is."""


class Server(ThreadingHTTPServer):
    """A thread for each request; `classroom` is what they all ask."""
    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for this machine's name
        self.server_name, self.server_port = self.server_address

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # those: the client has gone
            super().handle_error(request, client_address)


def listen(port):
    """A server on this port; on the first free one from FIRST_PORT if it is None."""
    ports = range(FIRST_PORT, FIRST_PORT + N_PORTS) if port is None else [port]
    for number in ports:
        try:
            return Server(("127.0.0.1", number), Page)
        except OSError as error:
            reason = error.strerror or error
            if port is None:
                print(f"port {number} cannot be had ({reason}); trying the next", file=sys.stderr)
    raise InputError(f"port {number} cannot be had ({reason}): name a free one with --port")


# ----------------------------------------------------------------------------------------- the command
def find_models(given):
    """{role: name}: the models named, or those of one run: a student, its teacher, its control if saved."""
    if len(given) > len(ROLES):
        raise InputError(f"{len(given)} models, but there are three places: teacher, student, control")
    if len(given) >= 2:
        return dict(zip(ROLES, given, strict=False))

    student = given[0] if given else "out"
    if not given and not Path(student, "config.json").is_file():
        raise InputError("no student in out/ yet: run `python distill.py` first, or name a teacher and a "
                         "student, as in `python -m extras.play gpt2 distilgpt2`")
    teacher = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        teacher = json.loads(Path(student, "args.json").read_text()).get("teacher")
    if teacher in (None, "none"):
        raise InputError(f"{student} does not say who its teacher was (no args.json, or none in it): name it "
                         f"first, as in `python -m extras.play demo/teacher {student}`")

    names = {"teacher": teacher, "student": student}
    control = Path(student, "control")
    if (control / "model.safetensors").is_file() and (control / "config.json").is_file():
        names["control"] = str(control)
    return names


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.play [MODEL ...] [options]")
    add = parser.add_argument_group("models").add_argument
    add("models", nargs="*", type=user_path, metavar="MODEL",
        help="folders, or names on the Hub, of one tokenizer: teacher, student, control; a student alone is "
             "asked who its teacher was; without any it is out")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")

    add = parser.add_argument_group("page").add_argument
    add("--port", type=checked(int, "0 to 65535", lambda n: 0 <= n < 2**16), metavar="N",
        help=f"where the page is; 0: any that is free; without it, the first free one from {FIRST_PORT}")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    names = find_models(args.models)
    with listen(args.port) as server:  # before the models, as it fails sooner
        server.classroom = Classroom(names, pick_device(args.device))
        for role, name in names.items():
            print(f"{role}: {name}")
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
            # From now on nobody computes: where Python ends a thread inside PyTorch, the process aborts.
            server.classroom.lock.acquire()


if __name__ == "__main__":
    run_cli(main)
