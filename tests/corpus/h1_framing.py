"""HTTP/1.1: where a body ends by Content-Length and Transfer-Encoding. What two readers end in two places is a second request to one."""

from __future__ import annotations

from corpus.case import (
    CONTROLS,
    NEXT,
    SMUGGLED,
    Case,
    Cases,
    chunked,
    declined,
    get,
    mixed,
    named,
    passed,
    post,
    refused,
)

LAST = b"0\r\n\r\n"


def both_lengths() -> Cases:
    """RFC 9112 §6.3 rule 3: Content-Length with Transfer-Encoding ought to be handled as an error, and here always is,
    in any order and spelling. §6.1: so is Transfer-Encoding in HTTP/1.0.
    """
    length = b"Content-Length: 6\r\n"
    for coding in (
        b"Transfer-Encoding: chunked", b"transfer-encoding:chunked", b"TRANSFER-ENCODING: CHUNKED",
        b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: chunked ",
        b"Transfer-Encoding: identity", b"Transfer-Encoding: xchunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding:", b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked", b" Transfer-Encoding: chunked",
        b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding:\r\n chunked",
        b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked", b"Transfer-Encoding\0: chunked",
        b"\0Transfer-Encoding: chunked", b'Transfer-Encoding: "chunked"',
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: cow, chunked",
    ):  # fmt: skip
        coded = coding + b"\r\n"
        expect = refused(400, 501)
        yield named(coding[:60]) + "-last", Case(sent=post(length + coded, LAST + b"x" + SMUGGLED), expect=expect)
        yield named(coding[:60]) + "-first", Case(sent=post(coded + length, LAST + b"x" + SMUGGLED), expect=expect)
    yield (
        "both-lengths",
        Case(sent=post(b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", LAST + SMUGGLED), expect=refused(400)),
    )
    yield (
        "both-lengths-reversed",
        Case(
            sent=post(
                b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", b"%x\r\n" % (len(SMUGGLED) + 2) + SMUGGLED
            ),
            expect=refused(400),
        ),
    )
    yield (
        "length-zero",
        Case(sent=post(b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", LAST + SMUGGLED), expect=refused(400)),
    )
    for name, fields in {
        "coding-in-1.0": b"Transfer-Encoding: chunked\r\n",
        "both-in-1.0": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "coding-in-1.0-kept-alive": b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n",
        "identity-in-1.0": b"Transfer-Encoding: identity\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=post(fields, LAST + SMUGGLED, version=b"HTTP/1.0"), expect=refused(400, 501))


def lengths() -> Cases:
    """RFC 9110 §8.6: digits and nothing else, once. RFC 9112 §6.3 rule 5: anything else is 400 and the end; a list of
    equal ones may be taken for one of them, and is not.
    """
    for value in (
        b"+1", b"-1", b"-0", b"0x1", b"0X1", b"1x", b"x1", b"1 1", b"1\t1", b"1.0", b"1e0", b"1e", b"'1'", b'"1"',
        b"1_0", b"1,", b",1", b"1;", b"1 ;q=1", b"(1)1", b"one",
        b"0b1", b"0o1", b"1L", b"1%", b"%31", b"\xd9\xa1", b"\xef\xbc\x91", b"\xb9", b"\x0b1", b"1\x0b", b"\x0c1",
        b"1\x0c", b"1\0", b"\x001", b"1\r", b"\xa01", b"1\x85", b"",
        b" ", b"\t", b"99999999999999999999", b"18446744073709551616", b"18446744073709551617", b"9223372036854775808",
        b"4294967297" + b"0" * 12, b"1" * 300, b"1, 1", b"1,1", b"1, 52", b"1 1\r\n 1",
        b"NaN", b"Infinity", b"true", b"=1", b"1=", b"--1", b"++1", b"1-", b"1/1", b"*", b"0,0",
    ):  # fmt: skip
        yield (
            "value-" + named(value),
            Case(sent=post(b"Content-Length: " + value + b"\r\n", b"x" + SMUGGLED), expect=refused(400, 413)),
        )
    yield "empty-and-a-request", Case(sent=post(b"Content-Length: \r\n", SMUGGLED), expect=refused(400))
    yield (
        "beyond-and-a-request",
        Case(sent=post(b"Content-Length: 99999999999999999999\r\n", SMUGGLED), expect=refused(400, 413)),
    )
    for name, value, body in (
        ("zeros", b"0001", b"x"), ("all-zeros", b"0000", b""), ("space-around", b" \t 3 \t ", b"abc"),
        ("eighteen-digits", b"000000000000000003", b"abc"),
    ):  # fmt: skip
        yield (
            "value-with-" + name,
            Case(sent=post(b"Content-Length:" + value + b"\r\n", body + NEXT), expect=passed(body, b"") + refused(400)),
        )
    for name, fields in {
        "twice": b"Content-Length: 1\r\nContent-Length: 1\r\n",
        "two-ways": b"Content-Length: 1\r\nContent-Length: 52\r\n", "three-times": b"Content-Length: 1\r\n" * 3,
        "two-ways-reversed": b"Content-Length: 52\r\nContent-Length: 1\r\n",
        "far-apart": b"Content-Length: 1\r\nX: y\r\nContent-Length: 0\r\n",
        "one-empty": b"Content-Length: 1\r\nContent-Length:\r\n",
        "first-empty": b"Content-Length:\r\nContent-Length: 1\r\n",
        "in-cases": b"Content-Length: 1\r\ncONTENT-lENGTH: 52\r\n",
        "zeros-and-one": b"Content-Length: 01\r\nContent-Length: 1\r\n",
        "space-before-colon": b"Content-Length : 5\r\n", "tab-before-colon": b"Content-Length\t: 5\r\n",
        "vtab-before-value": b"Content-Length:\x0b5\r\n", "indented": b"X: y\r\n Content-Length: 5\r\n",
        "folded": b"Content-Length:\r\n 5\r\n", "folded-digits": b"Content-Length: 1\r\n 0\r\n",
        "behind-lf": b"X: y\nContent-Length: 5\r\n", "behind-cr": b"X: y\rContent-Length: 5\r\n",
        "name-with-nul": b"Content-Length\0: 5\r\n", "name-with-space": b"Content Length: 5\r\nContent-Length : 5\r\n",
        "name-with-soft-hyphen": b"Content\xc2\xadLength: 5\r\n", "no-colon": b"Content-Length 5\r\n",
        "name-with-nbsp": b"Content-Length\xa0: 5\r\n", "name-with-vtab": b"Content-Length\x0b: 5\r\n",
        "name-with-cr": b"Content-Length\r: 5\r\n", "name-first-cr": b"\rContent-Length: 5\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=post(fields, b"x" + SMUGGLED), expect=refused(400))
    for name in (
        b"Content_Length",
        b"Content.Length",
        b"Content-Length-",
        b"X-Content-Length",
        b"ContentLength",
        b"Content~Length",
        b"-Content-Length",
    ):
        yield "other-name-" + named(name), Case(sent=post(name + b": 3\r\n", NEXT), expect=passed(b"", b""))
    yield "of-get", Case(sent=get(b"Content-Length: 3\r\n") + b"abc" + NEXT, expect=passed(b"abc", b""))
    yield (
        "of-head",
        Case(sent=get(b"Content-Length: 3\r\n", line=b"HEAD /k-00000 HTTP/1.1") + b"abc", expect=passed(b"abc")),
    )
    yield (
        "of-delete",
        Case(
            sent=get(b"Content-Length: 3\r\n", line=b"DELETE /k-00000 HTTP/1.1") + b"abc" + NEXT,
            expect=passed(b"abc", b""),
        ),
    )
    yield (
        "of-options",
        Case(
            sent=get(b"Content-Length: 3\r\n", line=b"OPTIONS /k-00000 HTTP/1.1") + b"abc" + NEXT,
            expect=passed(b"abc", b""),
        ),
    )
    yield (
        "of-a-request",
        Case(sent=post(b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED + NEXT), expect=passed(SMUGGLED, b"")),
    )
    yield "none-of-post", Case(sent=post(b"", NEXT), expect=passed(b"", b""))
    yield "none-of-put", Case(sent=get(line=b"PUT /k-00000 HTTP/1.1") + NEXT, expect=passed(b"", b""))
    yield (
        "none-of-post-in-1.0",
        Case(sent=post(b"", SMUGGLED, version=b"HTTP/1.0"), expect=passed(ends=True) + refused(400, 411)),
    )
    yield (
        "in-1.0",
        Case(
            sent=post(b"Content-Length: 3\r\n", b"abc" + SMUGGLED, version=b"HTTP/1.0"),
            expect=passed(b"abc", ends=True),
        ),
    )
    yield (
        "in-1.0-kept-alive",
        Case(
            sent=post(b"Connection: keep-alive\r\nContent-Length: 3\r\n", b"abc" + SMUGGLED, version=b"HTTP/1.0"),
            expect=passed(b"abc", ends=True),
        ),
    )
    yield (
        "more-than-comes",
        Case(
            sent=post(b"Content-Length: 30\r\n", b"abc"),
            expect=refused(400, 408, 502, cut=True, silent=True),
            half=True,
        ),
    )
    yield (
        "more-than-comes-by-one",
        Case(
            sent=post(b"Content-Length: 4\r\n", b"abc"), expect=refused(400, 408, 502, cut=True, silent=True), half=True
        ),
    )
    yield (
        "and-nothing-comes",
        Case(sent=post(b"Content-Length: 30\r\n"), expect=refused(400, 408, 502, cut=True, silent=True), half=True),
    )


def codings() -> Cases:
    """RFC 9112 §6.1, §7: only `chunked`, alone and once, is understood here; 501 for a coding that is not, 400 for what
    is malformed. Those who look for the word in the value take many of these for chunked.
    """
    for value in (
        b"xchunked", b"chunkedx", b"x-chunked", b"chunked-x", b"chunke", b"hunked", b"chunk", b"chunked, identity",
        b"identity", b"identity, chunked", b"gzip", b"gzip, chunked", b"deflate, chunked",
        b"chunked, gzip", b"chunked, chunked", b"chunked,", b",chunked", b", chunked", b"chunked ,", b"chunked;q=1",
        b"chunked; a=b", b"chunked;", b'"chunked"', b"'chunked'", b"chunked\x0b", b"\x0bchunked",
        b"\x0cchunked", b"chunked\x0c", b"chunked\0", b"\0chunked", b"chun\0ked", b"chunked\r", b"\rchunked",
        b"chunked\n", b"\nchunked", b"chun ked", b"chunked chunked", b"chunked\tchunked", b"chunked/1.0", b"=chunked",
        b"\xa0chunked", b"chunked\xa0", b"\xc2\xa0chunked", b"ch\xc3\xbcnked", b"\xef\xbd\x83hunked",
        b"chun\xe2\x84\xaaed", b"CHUN\xe2\x84\xaaED", b"", b" ", b"0", b"true", b"trailers", b"br, chunked",
        b"compress", b"x-gzip, chunked", b"chunked=1",
        b"[chunked]", b"{chunked}", b"chunked\\", b"\\chunked", b"chunked#", b"%63hunked", b"chunked:", b":chunked",
        b"Transfer-Encoding: chunked",
    ):  # fmt: skip
        yield (
            "value-" + named(value),
            Case(sent=post(b"Transfer-Encoding: " + value + b"\r\n", LAST + SMUGGLED), expect=refused(400, 501)),
        )
    for name, fields in {
        "twice": b"Transfer-Encoding: chunked\r\n" * 2,
        "and-identity": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "identity-and": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        "and-gzip": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        "and-empty": b"Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n",
        "empty-and": b"Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n",
        "in-cases": b"Transfer-Encoding: chunked\r\ntransfer-ENCODING: x\r\n",
        "folded": b"Transfer-Encoding:\r\n chunked\r\n", "folded-with-tab": b"Transfer-Encoding:\r\n\tchunked\r\n",
        "folded-more": b"Transfer-Encoding: chunked\r\n , identity\r\n",
        "folded-in-word": b"Transfer-Encoding: chun\r\n ked\r\n", "folded-by-lf": b"Transfer-Encoding:\n chunked\r\n",
        "folded-by-cr": b"Transfer-Encoding:\r chunked\r\n",
        "folded-name": b"Transfer-Encoding\r\n : chunked\r\n",
        "folded-empty-line": b"Transfer-Encoding:\r\n \r\n chunked\r\n",
        "space-before-colon": b"Transfer-Encoding : chunked\r\n",
        "tab-before-colon": b"Transfer-Encoding\t: chunked\r\n",
        "vtab-before-value": b"Transfer-Encoding:\x0bchunked\r\n",
        "vtab-before-colon": b"Transfer-Encoding\x0b: chunked\r\n",
        "nul-before-colon": b"Transfer-Encoding\0: chunked\r\n",
        "indented": b"X: y\r\n Transfer-Encoding: chunked\r\n",
        "behind-lf": b"X: y\nTransfer-Encoding: chunked\r\n", "behind-cr": b"X: y\rTransfer-Encoding: chunked\r\n",
        "behind-lfcr": b"X: y\n\rTransfer-Encoding: chunked\r\n", "name-with-space": b"Transfer Encoding: chunked\r\n",
        "name-with-soft-hyphen": b"Transfer\xc2\xadEncoding: chunked\r\n",
        "no-colon": b"Transfer-Encoding chunked\r\n", "name-first-cr": b"\rTransfer-Encoding: chunked\r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=post(fields, LAST + SMUGGLED), expect=refused(400, 501))
    for name, fields in {
        "in-capitals": b"TRANSFER-ENCODING: CHUNKED\r\n", "in-mixed-case": b"tRANSFER-eNCODING: cHUNKED\r\n",
        "no-space": b"Transfer-Encoding:chunked\r\n", "spaces-around": b"Transfer-Encoding: \t chunked \t \r\n",
    }.items():  # fmt: skip
        yield name, Case(sent=post(fields, b"3\r\nabc\r\n" + LAST + NEXT), expect=passed(b"abc", b"") + refused(400))
    for name in (
        b"Transfer_Encoding",
        b"Transfer.Encoding",
        b"X-Transfer-Encoding",
        b"TransferEncoding",
        b"Transfer-Encoding-",
        b"Content-Transfer-Encoding",
        b"Transfer~Encoding",
    ):
        yield (
            "other-name-" + named(name),
            Case(sent=post(name + b": chunked\r\nContent-Length: 5\r\n", LAST + NEXT), expect=passed(LAST, b"")),
        )
    yield (
        "of-get",
        Case(sent=get(b"Transfer-Encoding: chunked\r\n") + b"3\r\nabc\r\n" + LAST + NEXT, expect=passed(b"abc", b"")),
    )
    yield "of-get-and-empty", Case(sent=get(b"Transfer-Encoding: chunked\r\n") + LAST + NEXT, expect=passed(b"", b""))
    yield (
        "of-a-request",
        Case(sent=chunked(b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n" + LAST + NEXT), expect=passed(SMUGGLED, b"")),
    )


def controls_in_framing() -> Cases:
    """RFC 9110 §5.5: no control stands in a field value; least of all in one that frames (RFC 9112 §6.3)."""
    for name, char in CONTROLS.items():
        yield (
            f"length-before-{name}",
            Case(sent=post(b"Content-Length: 1" + char + b"\r\n", b"x" + SMUGGLED), expect=refused(400, 408)),
        )
        yield (
            f"length-after-{name}",
            Case(sent=post(b"Content-Length:" + char + b"1\r\n", b"x" + SMUGGLED), expect=refused(400, 408)),
        )
        yield (
            f"coding-before-{name}",
            Case(
                sent=post(b"Transfer-Encoding: chunked" + char + b"\r\n", LAST + SMUGGLED),
                expect=refused(400, 408, 501),
            ),
        )
        yield (
            f"coding-after-{name}",
            Case(
                sent=post(b"Transfer-Encoding:" + char + b"chunked\r\n", LAST + SMUGGLED), expect=refused(400, 408, 501)
            ),
        )
        yield (
            f"chunk-size-before-{name}",
            Case(sent=chunked(b"3" + char + b"\r\nabc\r\n" + LAST + SMUGGLED), expect=refused(400, 408)),
        )


def behind_a_doubt() -> Cases:
    """RFC 9112 §9.3.2, §2.2: after a message in doubt nothing behind it can be trusted to be a request. After one that was only
    denied it can, as long as its end is known.
    """
    secret = b"POST /secret/k-00000 HTTP/1.1"
    yield "after-malformed", Case(sent=get(line=b"GET /%zz HTTP/1.1") + SMUGGLED, expect=refused(400))
    yield (
        "after-denied-chunks",
        Case(sent=get(b"Transfer-Encoding: chunked\r\n", line=secret) + LAST + SMUGGLED, expect=refused(403)),
    )
    yield (
        "after-denied-body",
        Case(
            sent=get(b"Content-Length: %d\r\n" % len(SMUGGLED), line=secret) + SMUGGLED + NEXT,
            expect=mixed(403, 200, arrived=[b""]),
        ),
    )
    yield (
        "after-denied-body-that-is-large",
        Case(sent=get(b"Content-Length: 999999\r\n", line=secret) + SMUGGLED, expect=refused(403)),
    )
    yield (
        "after-denied",
        Case(sent=get(line=b"GET /secret/k-00000 HTTP/1.1") + NEXT, expect=mixed(403, 200, arrived=[b""])),
    )
    yield "after-close", Case(sent=get(b"Connection: close\r\n") + SMUGGLED, expect=passed(ends=True))
    yield "after-close-in-capitals", Case(sent=get(b"Connection: CLOSE\r\n") + SMUGGLED, expect=passed(ends=True))
    yield (
        "after-close-in-list",
        Case(sent=get(b"Connection: keep-alive, close\r\n") + SMUGGLED, expect=passed(ends=True)),
    )
    yield (
        "after-close-in-second-field",
        Case(sent=get(b"Connection: keep-alive\r\nConnection: close\r\n") + SMUGGLED, expect=passed(ends=True)),
    )
    yield "after-1.0", Case(sent=get(line=b"GET /k-00000 HTTP/1.0") + SMUGGLED, expect=passed(ends=True))
    yield "after-sound", Case(sent=get() + NEXT, expect=passed(b"", b""))
    yield "after-several", Case(sent=get() + NEXT * 5, expect=passed(*[b""] * 6))
    yield (
        "after-body-and-chunks",
        Case(
            sent=post(b"Content-Length: 3\r\n", b"abc") + chunked(b"3\r\ndef\r\n" + LAST) + NEXT,
            expect=passed(b"abc", b"def", b""),
        ),
    )
    yield "garbage-behind", Case(sent=get() + b"\0\0\0", expect=mixed(200, 400, arrived=[b""], ends=True))
    yield "half-a-request-behind", Case(sent=get() + b"GET /k-00000/smuggled HT", expect=passed(ends=True), half=True)
    yield (
        "lf-request-behind",
        Case(sent=get() + SMUGGLED.replace(b"\r\n", b"\n"), expect=mixed(200, (400, 408), arrived=[b""], ends=True)),
    )
    yield (
        "doubt-behind",
        Case(
            sent=get() + post(b"Content-Length: 1\r\nContent-Length: 2\r\n", b"x") + SMUGGLED,
            expect=mixed(200, 400, arrived=[b""], ends=True),
        ),
    )
    yield (
        "preface-behind",
        Case(sent=get() + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", expect=mixed(200, (400, 505), arrived=[b""], ends=True)),
    )
    yield (
        "hello-behind",
        Case(sent=get() + b"\x16\x03\x01\x02\x00\x01", expect=mixed(200, 400, arrived=[b""], ends=True)),
    )
    yield "loop", Case(sent=get(b"Via: 1.1 elsewhere, 1.1 there\r\n"), expect=passed())
    yield (
        "after-expectation",
        Case(sent=get(b"Expect: x\r\nContent-Length: %d\r\n" % len(SMUGGLED)) + SMUGGLED, expect=declined(417)),
    )
