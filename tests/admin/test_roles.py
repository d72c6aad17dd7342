"""What a page offers, the person who sees it may do: every link and form of every page, by role."""

from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

import pytest
from people import csrf_token

# Ends the session that the test looks around with.
LEFT_ALONE = {"/admin/sign-out"}


class Offers(HTMLParser):
    """The addresses that a page links to, polls, or sends a form to."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.sent = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a" and given.get("href"):
            self.seen.add(given["href"])
        for name in ("hx-get", "data-source", "data-export"):
            if given.get(name):
                self.seen.add(given[name])
        if tag == "form" and given.get("method") == "post":
            self.sent.add(given.get("action") or "")
        if given.get("hx-post"):
            self.sent.add(given["hx-post"])
        if given.get("formaction"):
            self.sent.add(given["formaction"])


@pytest.mark.parametrize(("role", "least"), [("admin", 20), ("support", 6)])
def test_nothing_is_offered_that_is_refused(request, buy, drain, role, least):
    buy(1)
    drain()
    browser = request.getfixturevalue(role)
    token = csrf_token(browser)
    to_see, seen, to_send = {"/admin/"}, set(), set()
    while to_see:
        path = to_see.pop()
        # One filter of a page stands for all: an export may be asked for ten times a minute.
        if (place := urlsplit(path).path) in seen:
            continue
        seen.add(place)
        answer = browser.get(path, follow_redirects=True)
        assert answer.status_code == 200, path
        text = answer.text  # an export's, too, which else would never end
        if not answer.mimetype.startswith("text/html") or path.startswith("/admin/rq"):
            continue
        offers = Offers(text)
        targets = {urldefrag(urljoin(path, address)).url for address in offers.seen}
        to_see |= {target for target in targets if urlsplit(target).path.startswith("/admin")}
        to_send |= {urljoin(path, address) for address in offers.sent}
    assert len(seen) >= least
    assert len(to_send - LEFT_ALONE) >= 1
    for path in to_send - LEFT_ALONE:
        # Without its fields, so that it is refused as wrong, and changes nothing.
        status = browser.post(path, data={"csrf_token": token}).status_code
        assert status not in (403, 404, 405, 500), path
