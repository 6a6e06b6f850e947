"""WikiText's rules: rows -> articles, and articles -> ordinary text, as lm-evaluation-harness has them."""
import re


def wikitext_articles(rows):
    """Rows of Salesforce/wikitext, a line each -> articles, byte for byte lm-evaluation-harness's pages."""
    article = []
    for row in rows:
        line = row.rstrip("\n") or " "  # the Hub's copy has emptied the blank lines
        # An article begins with " = Title = "; " = = Section = = " is a heading within one.
        if re.fullmatch(r" = (?!= ).*(?<! =) = ", line):
            if "".join(article).strip():  # before the first title there are only blank lines
                yield "\n".join(article)
            article = []
        article.append(line)
    yield "\n".join([*article, ""])  # the file ends with a line break


# Pattern, what it becomes. These are the harness's rules in its order: figures can be compared only if the
# text is the same, so its slips stay, too.
RULES = [
    ("s '", "s'"),
    ("/' [0-9]/", "/'[0-9]/"),  # a slip: the slashes of a JavaScript pattern are part of it
    *((f" @[{c}]@ ", c) for c in "-,."),  # 2 @.@ 5 -> 2.5
    *((f" [{c}] ", f"{c} ") for c in ":;.!?,"),  # "so , then" -> "so, then"
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),  # ( so ) -> (so)
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^\}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"\'\s*([^\']*?)\s*\'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize_wikitext(page):
    """WikiText is cut into words; RULES put them together again.

    ' = Oz = \\n It is " 1 @.@ 5 " km . \\n' -> ' = Oz =\\nIt is "1.5" km.\\n'
    """
    for pattern, replacement in RULES:
        page = re.sub(pattern, replacement, page)
    return page
