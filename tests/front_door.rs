//! What the listener answers to malformed, hostile and merely unusual requests, row by row.
//!
//! Every input is sent whole, byte by byte, and cut at places without a pattern, each time with a good request right
//! behind it: either that one gets its own answer, or the connection is closed and it gets none.

mod support;

use std::io::Write;
use std::net::{Shutdown, SocketAddr};

use support::tls::{Authority, Tunnel};
use support::{Client, Weir, base_config, free_address, noise, records, request};

/// What a connection is worth after the answer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum After {
    Closed,
    InSync,
}
use After::{Closed, InSync};

/// One input and its one answer.
struct Case {
    /// The row of the table that it belongs to; 0 for none.
    row: u32,
    wire: Vec<u8>,
    status: u16,
    /// Empty for an accepted request.
    code: &'static str,
    after: After,
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn add(
        &mut self,
        row: u32,
        wire: impl AsRef<[u8]>,
        status: u16,
        code: &'static str,
        after: After,
    ) {
        self.0.push(Case {
            row,
            wire: wire.as_ref().to_vec(),
            status,
            code,
            after,
        });
    }

    /// POSTs with these fields beside Host and this body, which are all answered the same.
    fn fields<const N: usize>(
        &mut self,
        row: u32,
        status: u16,
        code: &'static str,
        fields: [&str; N],
    ) {
        for fields in fields {
            self.add(row, post(fields, BAD), status, code, Closed);
        }
    }

    /// Chunked POSTs with these bodies.
    fn chunked<const N: usize>(
        &mut self,
        row: u32,
        status: u16,
        code: &'static str,
        bodies: [&str; N],
    ) {
        for body in bodies {
            let wire = post("Transfer-Encoding: chunked\r\n", body);
            self.add(row, wire, status, code, Closed);
        }
    }

    /// Requests with these first lines.
    fn lines<const N: usize>(
        &mut self,
        row: u32,
        status: u16,
        code: &'static str,
        lines: [&str; N],
    ) {
        for line in lines {
            self.add(
                row,
                format!("{line}\r\nHost: a\r\n\r\n"),
                status,
                code,
                Closed,
            );
        }
    }
}

/// A body that must never be stored.
const BAD: &str = "{\"bad\":1}";
const BAD_LENGTH: &str = "Content-Length: 9\r\n";
const GOOD: &[u8] = b"{\"good\":1}";

fn post(fields: &str, body: &str) -> String {
    format!("POST /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
}

/// POST with a body that has a length.
fn post_length(fields: &str) -> String {
    post(&format!("{BAD_LENGTH}{fields}"), BAD)
}

fn framing(table: &mut Table) {
    table.fields(
        1,
        400,
        "bad_framing",
        [
            "Content-Length: 9\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 9\r\n",
            "Transfer-Encoding: gzip\r\nContent-Length: 9\r\n",
            "content-length: 9\r\nTRANSFER-ENCODING: Chunked\r\n",
        ],
    );
    table.fields(
        2,
        400,
        "bad_framing",
        [
            "Content-Length: 9\r\nContent-Length: 8\r\n",
            "Content-Length: 9\r\nX: y\r\ncontent-length: 99\r\n",
            "Content-Length: 9, 8\r\n",
            "Content-Length: 5,6\r\n",
        ],
    );
    table.fields(
        3,
        400,
        "bad_framing",
        [
            "Content-Length: 9\r\nContent-Length: 9\r\n",
            "Content-Length: 9, 9\r\n",
            "Content-Length: 9,\r\n",
        ],
    );
    table.fields(
        4,
        400,
        "bad_framing",
        [
            "Content-Length: +9\r\n",
            "Content-Length: -9\r\n",
            "Content-Length: -0\r\n",
            "Content-Length: 0x9\r\n",
            "Content-Length: 1_0\r\n",
            "Content-Length: 9 9\r\n",
            "Content-Length:\r\n",
            "Content-Length: \r\n",
            "Content-Length: \t9\r\n",
            "Content-Length:\t9\r\n",
            "Content-Length: 9\t\r\n",
            "Content-Length: 9\t9\r\n",
            "Content-Length: nine\r\n",
            "Content-Length: 9;\r\n",
            "Content-Length: \u{0669}\r\n",
            "Content-Length: 9.0\r\n",
        ],
    );
    table.fields(
        5,
        400,
        "bad_framing",
        [
            "Content-Length: 9223372036854775808\r\n",
            "Content-Length: 18446744073709551625\r\n",
            "Content-Length: 99999999999999999999999\r\n",
        ],
    );
    table.fields(
        5,
        413,
        "body_too_large",
        [
            "Content-Length: 9223372036854775807\r\n",
            "Content-Length: 1000000000\r\n",
            "Content-Length: 1000000000\r\nExpect: 100-continue\r\n",
        ],
    );
    table.fields(
        6,
        501,
        "transfer_coding_unsupported",
        [
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: identity\r\n",
            "Transfer-Encoding: gzip\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: deflate , chunked\r\n",
        ],
    );
    table.fields(
        6,
        400,
        "bad_framing",
        [
            "Transfer-Encoding:\r\n",
            "Transfer-Encoding: \r\n",
            "Transfer-Encoding: chunked;p=1\r\n",
            "Transfer-Encoding: \"chunked\"\r\n",
            "Transfer-Encoding:\tchunked\r\n",
            "Transfer-Encoding: chu nked\r\n",
            "Transfer-Encoding: chunk\u{e9}d\r\n",
        ],
    );
    table.fields(
        6,
        400,
        "bad_head",
        [
            "Transfer-Encoding: \x0bchunked\r\n",
            "Transfer-Encoding: chunked\x0c\r\n",
            "Transfer-Encoding: chunked\0\r\n",
            "Transfer-Encoding\x0b: chunked\r\n",
        ],
    );
    table.fields(
        7,
        400,
        "bad_framing",
        [
            "Transfer-Encoding: chunked, chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
            "Transfer-Encoding: ,chunked\r\n",
            "Transfer-Encoding: chunked,\r\n",
            "Transfer-Encoding: chunked, gzip\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
        ],
    );
    for fields in ["", "Host: a\r\n", "Connection: keep-alive\r\n"] {
        let wire = format!(
            "POST /x HTTP/1.0\r\n{fields}Transfer-Encoding: chunked\r\n\r\n9\r\n{BAD}\r\n0\r\n\r\n"
        );
        table.add(8, wire, 400, "bad_framing", Closed);
    }
}

fn chunks(table: &mut Table) {
    table.chunked(
        9,
        400,
        "bad_chunk",
        [
            "0x9\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "+9\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "-1\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "9_0\r\n{\"bad\":1}\r\n0\r\n\r\n",
            " 9\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "9 \r\n{\"bad\":1}\r\n0\r\n\r\n",
            "\t9\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "g\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "00000000000000009\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "9\r\n{\"bad\":1}\r\n\r\n",
        ],
    );
    table.chunked(
        10,
        400,
        "bad_chunk",
        [
            "9\n{\"bad\":1}\r\n0\r\n\r\n",
            "9\r{\"bad\":1}\r\n0\r\n\r\n",
            "9\r\n{\"bad\":1}\n0\r\n\r\n",
            "9\r\n{\"bad\":1}0\r\n\r\n",
            "9\r\n{\"bad\":1} \r\n0\r\n\r\n",
            "8\r\n{\"bad\":1}\r\n0\r\n\r\n",
            "9\r\n{\"bad\":1}\r\n0\n\n",
            "9\r\n{\"bad\":1}\r\n0\r\n\n",
            "9\r\n{\"bad\":1}\r\n0\r\nX: y\n\r\n",
        ],
    );
    let chunk = |extension: &str| format!("9{extension}\r\n{{\"bad\":1}}\r\n0\r\n\r\n");
    let long = format!(";a={}", "b".repeat(254));
    let many = format!(";{}\r\n \r\n", "c".repeat(255));
    let many = format!("{}0\r\n\r\n", format!("1{many}").repeat(17));
    for body in [
        chunk(";a\0"),
        chunk(";a\rb"),
        chunk(";"),
        chunk(";;a"),
        chunk(";a="),
        chunk(";a b"),
        chunk("; a"),
        chunk(" ;a"),
        chunk(";a=\"b"),
        chunk(";(a)"),
        chunk(&long),
        many,
    ] {
        let wire = post("Transfer-Encoding: chunked\r\n", &body);
        table.add(11, wire, 400, "bad_chunk", Closed);
    }
    let trailers = |fields: &str| {
        let body = format!("9\r\n{{\"bad\":1}}\r\n0\r\n{fields}\r\n");
        post("Transfer-Encoding: chunked\r\n", &body)
    };
    for field in [
        "Content-Length: 9",
        "Transfer-Encoding: chunked",
        "Host: b",
        "Authorization: Bearer x",
        "Content-Type: text/plain",
        "content-encoding: gzip",
        "X-Hub-Signature-256: sha256=00",
        "x-hub-signature: sha1=00",
        "X: a\0b",
        "X : y",
        ": y",
        "X",
        " X: y",
    ] {
        let wire = trailers(&format!("A: b\r\n{field}\r\n"));
        table.add(12, wire, 400, "bad_chunk", Closed);
    }
    let long = format!("X: {}\r\n", "y".repeat(4096));
    let many = "X: y\r\n".repeat(700);
    for fields in [long, many] {
        table.add(12, trailers(&fields), 431, "trailers_too_large", Closed);
    }
}

fn lines_and_fields(table: &mut Table) {
    for byte in [0, 1, 8, 0x0b, 0x0c, 0x1b, 0x1f, 0x7f] {
        let field = format!("X: a{}b\r\n", char::from(byte));
        table.add(13, post_length(&field), 400, "bad_head", Closed);
    }
    table.add(13, post_length("X: a\rb\r\n"), 400, "bad_head", Closed);
    table.add(13, post_length("X: \r\r\n"), 400, "bad_head", Closed);
    for wire in [
        "POST /x HTTP/1.1\nHost: a\r\nContent-Length: 9\r\n\r\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\nHost: a\nContent-Length: 9\r\n\r\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\n\r\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\n{\"bad\":1}",
        "POST /x HTTP/1.1\nHost: a\nContent-Length: 9\n\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\nHost: a\rContent-Length: 9\r\n\r\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\r\nHost: a\r\n\r\n",
    ] {
        table.add(14, wire, 400, "bad_head", Closed);
    }
    for fields in [
        "X: a\r\n b\r\n",
        "X: a\r\n\tb\r\n",
        "X:\r\n b\r\n",
        "X: a\r\n \r\n",
    ] {
        table.add(15, post_length(fields), 400, "bad_head", Closed);
    }
    for wire in [
        "POST /x HTTP/1.1\r\n Host: a\r\n\r\n",
        "POST /x HTTP/1.1\r\n\tHost: a\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost : a\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length : 9\r\n\r\n{\"bad\":1}",
        "POST /x HTTP/1.1\r\nHost: a\r\nName\t: v\r\n\r\n",
    ] {
        table.add(16, wire, 400, "bad_head", Closed);
    }
    for field in [
        ": v\r\n",
        "no colon\r\n",
        "Na(me: v\r\n",
        "Na me: v\r\n",
        "\"Name\": v\r\n",
        "Na\u{e9}me: v\r\n",
    ] {
        table.add(17, post_length(field), 400, "bad_head", Closed);
    }
    table.add(
        17,
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length\x85: 9\r\n\r\n{\"bad\":1}",
        400,
        "bad_head",
        Closed,
    );
    for host in [
        "",
        "Host: a\r\nHost: a\r\n",
        "Host: a\r\nHost: b\r\n",
        "Host:\r\n",
        "Host: \r\n",
        "Host: a,b\r\n",
        "Host: a, b\r\n",
        "Host: u@a\r\n",
        "Host: u:p@a\r\n",
        "Host: a/b\r\n",
        "Host: a?b\r\n",
        "Host: a:65536\r\n",
        "Host: a:b\r\n",
        "Host: a:\r\n",
        "Host: :80\r\n",
        "Host: [::1\r\n",
        "Host: a b\r\n",
        "Host: a\tb\r\n",
        "Host: http://a\r\n",
    ] {
        let wire = format!("POST /x HTTP/1.1\r\n{host}{BAD_LENGTH}\r\n{BAD}");
        table.add(18, wire, 400, "bad_host", Closed);
    }
    for target in [
        "http://b/x",
        "http://a:80/x",
        "http://b",
        "https://ab/x",
        "http://u@a/x",
    ] {
        let wire = format!("POST {target} HTTP/1.1\r\nHost: a\r\n{BAD_LENGTH}\r\n{BAD}");
        table.add(19, wire, 400, "bad_host", Closed);
    }
    for target in [
        "http://a/x",
        "HTTP://A/x",
        "https://a/x?y",
        "http://a",
        "http://a?y",
    ] {
        let wire = format!(
            "POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{{\"good\":1}}"
        );
        table.add(19, wire, 201, "", InSync);
    }
}

fn request_line(table: &mut Table) {
    table.lines(
        20,
        400,
        "bad_target",
        [
            "GET ! HTTP/1.1",
            "POST x HTTP/1.1",
            "POST * HTTP/1.1",
            "POST /a\\b HTTP/1.1",
            "POST /a#b HTTP/1.1",
            "POST /%zz HTTP/1.1",
            "POST /%4 HTTP/1.1",
            "POST /% HTTP/1.1",
            "POST /%00 HTTP/1.1",
            "POST /a%0d%0aX:%20y HTTP/1.1",
            "POST /%c0%af HTTP/1.1",
            "POST /%c0%ae%c0%ae/ HTTP/1.1",
            "POST /%ff HTTP/1.1",
            "POST // HTTP/1.1",
            "POST //x HTTP/1.1",
            "POST /x//y HTTP/1.1",
            "POST /../ HTTP/1.1",
            "POST /x/.. HTTP/1.1",
            "POST /x/./y HTTP/1.1",
            "POST /x/%2e%2E/y HTTP/1.1",
            "POST /x?a=%00 HTTP/1.1",
            "POST /x?a=% HTTP/1.1",
            "POST /\"x\" HTTP/1.1",
            "POST /{x} HTTP/1.1",
            "POST ftp://a/x HTTP/1.1",
            "OPTIONS ** HTTP/1.1",
            "CONNECT a/x HTTP/1.1",
        ],
    );
    table.lines(
        20,
        400,
        "bad_head",
        [
            "POST /a b HTTP/1.1",
            "POST /a\0b HTTP/1.1",
            "POST /a\x7fb HTTP/1.1",
        ],
    );
    table.lines(
        21,
        400,
        "bad_head",
        [
            "POST /x HTTP/1.32",
            "POST /x HTTP/1.2",
            "POST /x HTTP/01.1",
            "POST /x HTTP/1.",
            "POST /x HTTP/1",
            "POST /x HTTP/2",
            "POST /x http/1.1",
            "POST /x HTTP/x.1",
            "POST /x HTTP/1,1",
            "POST /x HTTP /1.1",
            "POST\t/x\tHTTP/1.1",
            "POST /x\tHTTP/1.1",
            "POST  /x HTTP/1.1",
            "POST /x  HTTP/1.1",
            "POST /x HTTP/1.1 ",
            " POST /x HTTP/1.1",
        ],
    );
    table.lines(
        21,
        505,
        "version_unsupported",
        ["POST /x HTTP/2.0", "POST /x HTTP/0.9", "POST /x HTTP/3.1"],
    );
    for wire in ["GET /\r\n", "GET /x\r\n\r\n", "POST /x\r\nHost: a\r\n\r\n"] {
        table.add(22, wire, 400, "bad_head", Closed);
    }
    let long = |size: usize| format!("POST /long/{} HTTP/1.1", "x".repeat(size - 20));
    let line = long((8 << 10) + 1);
    table.add(
        23,
        format!("{line}\r\nHost: a\r\n\r\n"),
        414,
        "request_line_too_large",
        Closed,
    );
    table.add(
        23,
        "X".repeat(9 << 10),
        414,
        "request_line_too_large",
        Closed,
    );
    table.add(
        23,
        post(&format!("X: {}\r\n", "y".repeat(16 << 10)), ""),
        431,
        "head_too_large",
        Closed,
    );
    table.add(
        23,
        post(&format!("X: {}\r\n", "y".repeat(1000)).repeat(17), ""),
        431,
        "head_too_large",
        Closed,
    );
    table.add(
        23,
        post(&"X: y\r\n".repeat(64), ""),
        431,
        "too_many_headers",
        Closed,
    );
    // The longest line, and the largest number of fields, are taken.
    let line = long(8 << 10);
    let fields = "X: y\r\n".repeat(62);
    let wire = format!("{line}\r\nHost: a\r\n{fields}Content-Length: 10\r\n\r\n{{\"good\":1}}");
    table.add(23, wire, 201, "", InSync);
}

fn decided_from_the_head(table: &mut Table) {
    let with = |line: &str, fields: &str, body: &str| {
        format!("{line} HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
    };
    let large = format!("Content-Length: {}\r\n", (64 << 10) + 1);
    for (methods, status, code) in [
        (
            &["post", "Post", "GETS", "X", "PROPFIND", "PRI"][..],
            501,
            "method_unknown",
        ),
        (
            &["GET", "DELETE", "OPTIONS", "PATCH", "TRACE"],
            405,
            "method_not_allowed",
        ),
    ] {
        for method in methods {
            let line = format!("{method} /x");
            table.add(24, with(&line, "", ""), status, code, InSync);
            table.add(29, with(&line, BAD_LENGTH, BAD), status, code, InSync);
            table.add(24, with(&line, &large, BAD), status, code, Closed);
            table.add(
                24,
                with(&line, "Transfer-Encoding: chunked\r\n", "0\r\n\r\n"),
                status,
                code,
                Closed,
            );
            table.add(
                24,
                with(&line, "Connection: close\r\n", ""),
                status,
                code,
                Closed,
            );
        }
    }
    table.add(
        24,
        with("CONNECT a:443", "", ""),
        405,
        "method_not_allowed",
        InSync,
    );
    table.add(
        24,
        with("OPTIONS *", "", ""),
        405,
        "method_not_allowed",
        InSync,
    );
    let large_body = "x".repeat(64 << 10);
    table.add(
        29,
        with("GET /x", "Content-Length: 65536\r\n", &large_body),
        405,
        "method_not_allowed",
        InSync,
    );

    table.add(
        25,
        with("POST /x", "Expect: x\r\nContent-Length: 9\r\n", ""),
        417,
        "expectation_failed",
        Closed,
    );
    table.add(
        25,
        with("POST /x", "Expect: 100-continue, x\r\n", ""),
        417,
        "expectation_failed",
        InSync,
    );
    table.add(
        25,
        with("POST /x", "Expect:\r\n", ""),
        417,
        "expectation_failed",
        InSync,
    );
    let expect = format!("Expect: 100-continue\r\n{BAD_LENGTH}");
    table.add(
        25,
        with("POST /nowhere/x", &expect, ""),
        404,
        "no_route",
        Closed,
    );
    table.add(
        25,
        with("GET /x", &expect, ""),
        405,
        "method_not_allowed",
        Closed,
    );
    table.add(
        25,
        with(
            "POST /x",
            &format!("{expect}Content-Type: text/plain\r\n"),
            "",
        ),
        415,
        "content_type_unsupported",
        Closed,
    );
    table.add(
        25,
        "POST /x HTTP/1.0\r\nExpect: 100-continue\r\nConnection: keep-alive\r\nContent-Length: 10\r\n\r\n{\"good\":1}",
        201,
        "",
        InSync,
    );
    for fields in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        "Upgrade: websocket\r\n",
    ] {
        let wire = post(&format!("{fields}Content-Length: 10\r\n"), "{\"good\":1}");
        table.add(26, wire, 201, "", InSync);
    }
    table.add(
        27,
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        505,
        "version_unsupported",
        Closed,
    );
    for option in ["close", "Close", "keep-alive, close", "x,close,y"] {
        let wire = post(
            &format!("Connection: {option}\r\nContent-Length: 10\r\n"),
            "{\"good\":1}",
        );
        table.add(28, wire, 201, "", Closed);
    }
    for field in [
        "Authorization: Basic YTpi",
        "Content-Type: application/json",
        "Content-Encoding: identity",
        "X-Hub-Signature: sha1=00",
        "X-Hub-Signature-256: sha256=00",
    ] {
        let twice = format!("{field}\r\nX: y\r\n{}\r\n", field.to_uppercase());
        table.add(31, post_length(&twice), 400, "bad_head", Closed);
    }
    for fields in [
        "Content_Length: 3\r\nContent-Length: 10\r\n",
        "Transfer_Encoding: chunked\r\nContent-Length: 10\r\n",
        "Content-Length: 10\r\nContent_Type: text/plain\r\n",
    ] {
        table.add(32, post(fields, "{\"good\":1}"), 201, "", InSync);
    }
    for (media_type, taken) in [
        ("application/json", true),
        ("application/cloudevents+json; charset=utf-8", true),
        ("application/x-ndjson", true),
        ("application/json-lines", true),
        ("application/x-www-form-urlencoded", false),
        ("application/msgpack", false),
        ("text/plain", false),
        ("", false),
    ] {
        let fields = format!("Content-Type: {media_type}\r\nContent-Length: 10\r\n");
        if taken {
            table.add(0, post(&fields, "{\"good\":1}"), 201, "", InSync);
        } else {
            table.add(
                0,
                post(&fields, "{\"bad\" :1}"),
                415,
                "content_type_unsupported",
                InSync,
            );
        }
    }
    for coding in ["gzip", "br", "gzip, gzip", "identity, gzip", ""] {
        let fields = format!("Content-Encoding: {coding}\r\n");
        table.add(
            0,
            post_length(&fields),
            415,
            "content_coding_unsupported",
            InSync,
        );
    }
    table.add(
        0,
        with("POST /nowhere/x", BAD_LENGTH, BAD),
        404,
        "no_route",
        InSync,
    );
    table.add(
        0,
        "\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03",
        400,
        "bad_head",
        Closed,
    );
    table.add(
        0,
        "\r\nPOST /x HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
        "bad_head",
        Closed,
    );
    table.add(0, "\n", 400, "bad_head", Closed);
}

/// Places to cut: none, every byte, and two sets without a pattern.
fn cuttings(size: usize, noise: &mut impl Iterator<Item = u64>) -> Vec<Vec<usize>> {
    let mut random = || {
        let mut cuts: Vec<usize> = (0..8)
            .map(|_| (noise.next().unwrap() >> 33) as usize % size)
            .collect();
        cuts.sort_unstable();
        cuts
    };
    vec![Vec::new(), (1..size).collect(), random(), random()]
}

/// Sends `wire` in pieces while the answers are read; a peer that has closed is sent no more.
fn exchange<T>(
    client: &mut Client,
    wire: &[u8],
    cuts: &[usize],
    read: impl FnOnce(&mut Client) -> T,
) -> T {
    let mut sender = client.stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut begin = 0;
            for end in cuts.iter().copied().chain([wire.len()]) {
                if sender.write_all(&wire[begin..end]).is_err() {
                    return;
                }
                begin = end;
            }
            let _ = sender.shutdown(Shutdown::Write);
        });
        read(client)
    })
}

const ROUTES: &str =
    "[[route]]\npath = \"/x\"\n[[route]]\npath = \"/\"\n[[route]]\npath = \"/long/*\"\n";

#[test]
fn every_row_of_the_table_has_its_answer_and_a_connection_in_sync_or_closed() {
    let weir = Weir::start(ROUTES);
    let address = weir.address;
    every_row_is_answered(weir, address);
}

/// The same through TLS: each piece that is sent is a record, or several.
#[test]
fn every_row_of_the_table_has_the_same_answer_over_tls() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    authority.server(1).write(directory.path());
    let admin = free_address();
    let plain = "address = \"127.0.0.1:0\"\n";
    let tls = format!("{plain}tls = {{ certificate = \"tls.crt\", key = \"tls.key\" }}\n");
    let config = base_config(admin).replacen(plain, &tls, 1) + ROUTES;
    let weir = Weir::start_in(directory, &config, admin);
    let tunnel = Tunnel::open(weir.address, authority.config(None), 16 * 1024);
    every_row_is_answered(weir, tunnel.address);
}

fn every_row_is_answered(weir: Weir, address: SocketAddr) {
    let mut table = Table::default();
    framing(&mut table);
    chunks(&mut table);
    lines_and_fields(&mut table);
    request_line(&mut table);
    decided_from_the_head(&mut table);
    let rows: std::collections::BTreeSet<u32> = table.0.iter().map(|case| case.row).collect();
    // Row 30 ends its stream and has a test of its own.
    let missing: Vec<u32> = (1..=32)
        .filter(|row| !rows.contains(row) && *row != 30)
        .collect();
    assert!(missing.is_empty(), "rows without an input: {missing:?}");

    let good = request("/x", GOOD);
    let mut noise = noise();
    let mut accepted = 0;
    let mut rejected = 0;
    for case in &table.0 {
        let wire = [case.wire.as_slice(), &good].concat();
        for cuts in cuttings(case.wire.len().max(2), &mut noise) {
            let input = case.wire.escape_ascii();
            let context = format!("row {}: {input}, {} cuts", case.row, cuts.len());
            let mut client = Client::connect(address);
            let (first, second) = exchange(&mut client, &wire, &cuts, |client| {
                (client.try_reply(), client.try_reply())
            });
            let first = first.unwrap_or_else(|| panic!("no answer: {context}"));
            assert_eq!(first.status, case.status, "{context}: {first:?}");
            if case.code.is_empty() {
                accepted += 1;
            } else {
                rejected += 1;
                assert_eq!(first.json()["code"], case.code, "{context}: {first:?}");
                assert!(first.json()["detail"].is_string());
            }
            assert_eq!(first.closes(), case.after == Closed, "{context}: {first:?}");
            match (case.after, second) {
                (Closed, None) => {}
                (InSync, Some(second)) => {
                    accepted += 1;
                    assert_eq!(second.status, 201, "{context}: {second:?}");
                    assert!(client.try_reply().is_none(), "{context}");
                }
                (after, second) => panic!("{after:?}, but {second:?}: {context}"),
            }
        }
    }
    assert_eq!(weir.outcomes(), [accepted, rejected, 0, 0]);
    let stored = records(&weir.stop().rows("Telemetry", "Events"));
    assert_eq!(stored.len() as u64, accepted);
    assert!(stored.iter().all(|record| record.as_bytes() == GOOD));
}

/// Row 30.
#[test]
fn a_stream_that_ends_within_a_request_is_aborted_and_stores_nothing() {
    let weir = Weir::start("");
    for wire in [
        "POST / HTT",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{\"a\":1}",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{\"a\":1}\r\n",
    ] {
        let mut client = weir.connect();
        client.send(wire.as_bytes());
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.reply().json()["code"], "body_truncated", "{wire:?}");
        client.expect_end();
    }
    // Ending between two requests is no request.
    let client = weir.connect();
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(weir.outcomes(), [0, 0, 0, 3]);
    let stopped = weir.stop();
    assert!(stopped.rows("Telemetry", "Events").is_empty());
}

/// A minute for everything but what `deadlines` says.
fn with_deadlines(deadlines: &str) -> Weir {
    let mut text = String::from("[deadlines]\n");
    for key in [
        "head",
        "body_start",
        "body",
        "body_rate_window",
        "write",
        "idle",
    ] {
        if !deadlines.contains(&format!("{key} =")) {
            text.push_str(&format!("{key} = \"60s\"\n"));
        }
    }
    Weir::start(&format!("{text}{deadlines}"))
}

#[test]
fn who_is_too_slow_is_told_so_and_nothing_is_stored() {
    let chunked = post("Transfer-Encoding: chunked\r\n", "");
    for (deadlines, wires) in [
        (
            "head = \"250ms\"\n",
            vec!["P".into(), "POST /x HTTP/1.1\r\nHost: a\r\nX: y\r\n".into()],
        ),
        (
            "body_start = \"250ms\"\n",
            vec![post(BAD_LENGTH, ""), chunked.clone()],
        ),
        (
            "body_rate = \"1GiB\"\nbody_rate_window = \"250ms\"\n",
            vec![post(BAD_LENGTH, "{\"bad"), chunked.clone() + "9\r\n{\"bad"],
        ),
        (
            "body = \"250ms\"\n",
            vec![post(BAD_LENGTH, "{\"bad"), chunked + "9\r\n{\"bad\":1}\r\n"],
        ),
    ] {
        let weir = with_deadlines(deadlines);
        for wire in &wires {
            let mut client = weir.connect();
            client.send(&request("/x", GOOD));
            client.send(wire.as_bytes());
            assert_eq!(client.reply().status, 201);
            let reply = client.reply();
            assert_eq!(
                (reply.status, reply.closes()),
                (408, true),
                "{deadlines}: {wire:?}"
            );
            assert_eq!(reply.json()["code"], "request_timeout");
            client.expect_end();
        }
        let count = wires.len() as u64;
        assert_eq!(weir.outcomes(), [count, count, 0, 0], "{deadlines}");
        assert_eq!(weir.metric("weir_deadlines_passed_total"), count);
        assert_eq!(weir.stop().rows("Telemetry", "Events").len() as u64, count);
    }
}

#[test]
fn a_slow_sender_keeps_no_slab_that_somebody_waits_for() {
    for wire in [
        "POST /x HTTP/1.1\r\nHost: a\r\nX: ".to_owned(),
        post(BAD_LENGTH, "{\"bad"),
    ] {
        let weir = with_deadlines(
            "contended = \"250ms\"\n[limits]\nwait = \"60s\"\n[slabs]\nclasses = [{ size = \"16KiB\", count = 2 }]\n",
        );
        let mut slow: Vec<_> = (0..2).map(|_| weir.connect()).collect();
        for client in &mut slow {
            client.send(wire.as_bytes());
        }
        weir.wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 2");
        assert_eq!(weir.connect().post("/x", GOOD).status, 201);
        // As many are cut as had to wait.
        assert_eq!(weir.metric("weir_deadlines_passed_total"), 1);
        assert_eq!(weir.outcomes(), [1, 1, 0, 0]);
        assert_eq!(weir.connect().post("/x", GOOD).status, 201);
        assert_eq!(weir.metric("weir_deadlines_passed_total"), 1);
    }
}

#[test]
fn who_sends_nothing_more_is_closed_without_an_answer() {
    // Long enough for a busy machine to send a request on a connection that is there.
    let weir = with_deadlines("idle = \"1s\"\n");
    let mut fresh = weir.connect();
    fresh.expect_end();
    let mut used = weir.connect();
    assert_eq!(used.post("/x", GOOD).status, 201);
    used.expect_end();
    // A rejected request has its answer, so the end of its body is not asked for.
    let weir = with_deadlines("body_start = \"250ms\"\n");
    let mut client = weir.connect();
    client.send(b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n");
    assert_eq!(client.reply().status, 405);
    client.expect_end();
    assert_eq!(weir.outcomes(), [0, 1, 0, 0]);
}

#[test]
fn who_does_not_take_its_answers_is_cut() {
    let weir = with_deadlines("write = \"250ms\"\n");
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // A small window, so that few answers fill it.
    socket.set_recv_buffer_size(1).unwrap();
    socket.connect(&weir.address.into()).unwrap();
    let mut stream: std::net::TcpStream = socket.into();
    stream.set_write_timeout(Some(support::PATIENCE)).unwrap();
    let requests = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n".repeat(100);
    while stream.write_all(&requests).is_ok() {}
    weir.wait_for_metric("weir_deadlines_passed_total 1");
    weir.wait_for_metric("weir_connections 0");
    assert_eq!(weir.connect().post("/x", GOOD).status, 201);
}

#[test]
fn a_connection_serves_so_many_requests_and_is_then_closed() {
    let weir = Weir::start("[limits]\nrequests_per_connection = 3\n");
    let mut client = weir.connect();
    client.send(&request("/x", GOOD).repeat(2));
    client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n");
    client.send(&request("/x", GOOD));
    let closes: Vec<bool> = (0..3).map(|_| client.reply().closes()).collect();
    assert_eq!(closes, [false, false, true]);
    client.expect_end();
}

#[test]
fn an_address_has_so_many_connections_and_no_more() {
    let weir = Weir::start("[limits]\nconnections_per_address = 2\n");
    let mut first = weir.connect();
    let mut second = weir.connect();
    assert_eq!(first.post("/x", GOOD).status, 201);
    assert_eq!(second.post("/x", GOOD).status, 201);
    let mut third = weir.connect();
    let reply = third.reply();
    assert_eq!((reply.status, reply.closes()), (429, true));
    assert_eq!(reply.json()["code"], "too_many_connections");
    third.expect_end();
    assert_eq!(weir.metric("weir_connections_refused_total"), 1);
    drop(first);
    weir.wait_for_metric("weir_connections 1");
    assert_eq!(weir.connect().post("/x", GOOD).status, 201);
    assert_eq!(weir.outcomes(), [3, 0, 0, 0]);
}

/// The hexadecimal HMAC-SHA-256 of `body`, by the library that weir uses; the example of GitHub's documentation holds
/// it elsewhere.
fn signature(secret: &str, body: &[u8]) -> String {
    use hmac::{Hmac, KeyInit, Mac};
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body);
    let bytes = mac.finalize().into_bytes();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Principals with the secrets `canary-…`, which must never be seen.
fn guarded() -> (Weir, tempfile::TempDir) {
    let secrets = tempfile::tempdir().unwrap();
    for name in ["old", "new", "hub"] {
        std::fs::write(secrets.path().join(name), format!("canary-{name}\n")).unwrap();
    }
    let file = |name: &str| format!("{{ file = {:?} }}", secrets.path().join(name));
    let config = format!(
        "[[principal]]\nname = \"shop\"\nbearer = [{old}, {new}]\n\
         [[principal]]\nname = \"user\"\nbasic = {{ user = \"u\", passwords = [{new}] }}\n\
         [[principal]]\nname = \"hub\"\nhmac = {{ secrets = [{old}, {hub}] }}\n\
         [[route]]\npath = \"/shop\"\nprincipals = [\"shop\", \"user\"]\n\
         [[route]]\npath = \"/hub\"\nprincipals = [\"hub\"]\n\
         [[route]]\npath = \"/far\"\nallow = [\"10.0.0.0/8\"]\n\
         [[route]]\npath = \"/slow\"\nrate = {{ bytes = 1, burst = \"1ms\" }}\n\
         [[route]]\npath = \"/x\"\n",
        old = file("old"),
        new = file("new"),
        hub = file("hub"),
    );
    (Weir::start(&config), secrets)
}

fn post_to(path: &str, fields: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

#[test]
fn who_may_send_is_decided_from_the_head_and_the_signature_before_anything_is_stored() {
    let (weir, _secrets) = guarded();
    let bad = BAD.as_bytes();
    let mut noise = noise();
    let (mut accepted, mut rejected) = (0, 0);
    for (path, fields, body, status) in [
        (
            "/shop",
            "Authorization: Bearer canary-old\r\n".into(),
            GOOD,
            201,
        ),
        (
            "/shop",
            "authorization: bearer canary-new\r\n".into(),
            GOOD,
            201,
        ),
        (
            "/shop",
            "Authorization: Basic dTpjYW5hcnktbmV3\r\n".into(),
            GOOD,
            201,
        ),
        ("/shop", String::new(), bad, 401),
        (
            "/shop",
            "Authorization: Bearer canary-hub\r\n".into(),
            bad,
            401,
        ),
        ("/shop", "Authorization: Bearer \r\n".into(), bad, 401),
        ("/shop", "Authorization: canary-old\r\n".into(), bad, 401),
        (
            "/shop",
            "Authorization: Basic dTpjYW5hcnktb2xk\r\n".into(),
            bad,
            401,
        ),
        (
            "/hub",
            format!(
                "X-Hub-Signature-256: sha256={}\r\n",
                signature("canary-hub", GOOD)
            ),
            GOOD,
            201,
        ),
        (
            "/hub",
            format!(
                "x-hub-signature-256: sha256={}\r\n",
                signature("canary-old", GOOD)
            ),
            GOOD,
            201,
        ),
        (
            "/hub",
            format!(
                "X-Hub-Signature-256: sha256={}\r\n",
                signature("canary-hub", GOOD)
            ),
            bad,
            401,
        ),
        (
            "/hub",
            format!(
                "X-Hub-Signature-256: sha256={}\r\n",
                signature("canary-new", bad)
            ),
            bad,
            401,
        ),
        (
            "/hub",
            format!("X-Hub-Signature-256: sha256={}\r\n", "0".repeat(63)),
            bad,
            401,
        ),
        ("/hub", String::new(), bad, 401),
        (
            "/hub",
            "Authorization: Bearer canary-old\r\n".into(),
            bad,
            403,
        ),
        ("/far", String::new(), bad, 403),
    ] {
        let wire = [post_to(path, &fields, body), request("/x", GOOD)].concat();
        for cuts in cuttings(wire.len(), &mut noise) {
            let mut client = weir.connect();
            let replies = exchange(&mut client, &wire, &cuts, |client| {
                [client.reply(), client.reply()]
            });
            assert_eq!(
                replies.each_ref().map(|reply| reply.status),
                [status, 201],
                "{path} {fields}"
            );
            let head = &replies[0].head;
            assert_eq!(head.contains("WWW-Authenticate: "), status == 401, "{head}");
            if status == 401 {
                assert_eq!(head.contains("Bearer realm"), path == "/shop");
                assert_eq!(head.contains("Hmac realm"), path == "/hub");
            }
            assert!(client.try_reply().is_none());
            accepted += 1 + u64::from(status == 201);
            rejected += u64::from(status != 201);
        }
    }
    // The signature is of the body, however that is framed.
    let mut client = weir.connect();
    let chunked = "a\r\n{\"good\":1}\r\n0\r\n\r\n";
    let sum = signature("canary-hub", GOOD);
    let fields = format!("X-Hub-Signature-256: sha256={sum}\r\nTransfer-Encoding: chunked\r\n");
    client.send(format!("POST /hub HTTP/1.1\r\nHost: a\r\n{fields}\r\n{chunked}").as_bytes());
    assert_eq!(client.reply().status, 201);
    // Whoever waits for 100 Continue sends no body in vain.
    client.send(
        b"POST /shop HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    );
    let reply = client.reply();
    assert_eq!((reply.status, reply.closes()), (401, true));
    client.expect_end();
    assert_eq!(weir.outcomes(), [accepted + 1, rejected + 1, 0, 0]);
    let stopped = weir.stop();
    let stored = records(&stopped.rows("Telemetry", "Events"));
    assert_eq!(stored.len() as u64, accepted + 1);
    assert!(stored.iter().all(|record| record.as_bytes() == GOOD));
    assert!(!stopped.stderr.contains("canary"), "{}", stopped.stderr);
}

#[test]
fn more_than_the_rate_is_told_when_to_come_again() {
    let (weir, _secrets) = guarded();
    let mut client = weir.connect();
    // More than the burst is taken once, and then takes a quarter of an hour to be made good.
    let large = [GOOD; 100].concat();
    assert_eq!(client.post("/slow", &large).status, 201);
    let reply = client.post("/slow", BAD.as_bytes());
    assert_eq!((reply.status, reply.closes()), (429, false));
    assert_eq!(reply.json()["code"], "rate_limited");
    let (_, after) = reply.head.split_once("Retry-After: ").unwrap();
    let seconds: u32 = after.lines().next().unwrap().parse().unwrap();
    assert!((100..=1000).contains(&seconds), "{reply:?}");
    assert_eq!(client.post("/x", GOOD).status, 201);
    assert_eq!(weir.outcomes(), [2, 1, 0, 0]);
}

#[test]
fn a_secret_that_cannot_be_read_is_named_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let config = format!(
        "{}[[principal]]\nname = \"shop\"\nbearer = [{{ env = \"WEIR_TEST_NO_SUCH_VARIABLE\" }}]\n",
        support::base_config(support::free_address())
    );
    let (code, stderr) = support::run_to_its_end(directory.path(), &config);
    assert_eq!(code, Some(2), "{stderr}");
    let line = stderr.lines().last().unwrap();
    assert!(
        line.contains("principal shop") && line.contains("WEIR_TEST_NO_SUCH_VARIABLE"),
        "{line}"
    );
}

/// A version 2 header of a TCP connection from this address.
fn proxy_v2(source: [u8; 4]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend_from_slice(&source);
    header.extend_from_slice(&[10, 0, 0, 9, 0, 80, 0, 81]);
    header
}

#[test]
fn a_proxy_says_whose_connection_it_is_and_nobody_else_can() {
    let admin = support::free_address();
    let start = |more: &str| {
        let routes = "[[route]]\npath = \"/x\"\n[[route]]\npath = \"/far\"\nallow = [\"10.1.2.0/24\", \"2001:db8::/32\"]\n";
        let config = support::base_config(admin).replace("[admin]", &format!("{more}[admin]"));
        Weir::start_with(&format!("{config}{routes}"), admin)
    };
    let weir = start("proxies = [\"127.0.0.0/8\"]\nallow = [\"10.0.0.0/8\", \"2001:db8::1\"]\n");
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    let line = |text: &str| format!("PROXY {text}\r\n").into_bytes();
    let mut noise = noise();
    for (header, x, far) in [
        (line("TCP4 10.1.2.3 10.0.0.9 80 81"), 201, 201),
        (line("TCP4 10.1.3.3 10.0.0.9 80 81"), 201, 403),
        (line("TCP4 11.0.0.1 10.0.0.9 80 81"), 403, 403),
        (line("TCP6 2001:db8::1 ::1 80 81"), 201, 201),
        (proxy_v2([10, 1, 2, 3]), 201, 201),
        (proxy_v2([11, 1, 2, 3]), 403, 403),
        // The proxy speaks for itself, and is not allowed.
        (line("UNKNOWN"), 403, 403),
        (local, 403, 403),
    ] {
        let wire = [header, request("/x", GOOD), request("/far", GOOD)].concat();
        for cuts in cuttings(wire.len(), &mut noise) {
            let mut client = weir.connect();
            let replies = exchange(&mut client, &wire, &cuts, |client| {
                [client.reply(), client.reply()]
            });
            let statuses = replies.map(|reply| reply.status);
            assert_eq!(statuses, [x, far], "{}", wire.escape_ascii());
        }
    }
    let before = weir.outcomes();
    for wire in [
        request("/x", GOOD),
        [line("TCP4 10.1.2.3 10.0.0.9 80"), request("/x", GOOD)].concat(),
        [
            line("TCP4 10.1.2.3 10.0.0.9 80 81"),
            line("TCP4 10.1.2.3 10.0.0.9 80 81"),
        ]
        .concat(),
        [proxy_v2([10, 1, 2, 3]), proxy_v2([10, 1, 2, 3])].concat(),
    ] {
        for cuts in cuttings(wire.len(), &mut noise) {
            let mut client = weir.connect();
            let reply = exchange(&mut client, &wire, &cuts, |client| client.reply());
            assert_eq!(
                (reply.status, reply.closes()),
                (400, true),
                "{}",
                wire.escape_ascii()
            );
            client.expect_end();
        }
    }
    // Who only looks whether somebody listens makes no request.
    let probe = weir.connect();
    probe.stream.shutdown(Shutdown::Write).unwrap();
    let [accepted, rejected, refused, aborted] = before;
    assert_eq!(weir.outcomes(), [accepted, rejected + 16, refused, aborted]);
    drop(weir);

    let weir = start("");
    for header in [
        line("TCP4 10.1.2.3 10.0.0.9 80 81"),
        proxy_v2([10, 1, 2, 3]),
    ] {
        let mut client = weir.connect();
        client.send(&[header, request("/far", GOOD)].concat());
        let reply = client.reply();
        assert_eq!((reply.status, reply.closes()), (400, true));
        assert_eq!(reply.json()["code"], "bad_head");
        client.expect_end();
    }
}

#[test]
fn connections_of_a_proxy_are_counted_by_their_source() {
    let admin = support::free_address();
    let config =
        support::base_config(admin).replace("[admin]", "proxies = [\"127.0.0.1\"]\n[admin]");
    let weir = Weir::start_with(
        &format!("{config}[limits]\nconnections_per_address = 1\n"),
        admin,
    );
    let open = |source: u8| {
        let mut client = weir.connect();
        client.send(&[proxy_v2([10, 0, 0, source]), request("/x", GOOD)].concat());
        let reply = client.reply();
        (client, reply)
    };
    let (first, reply) = open(1);
    assert_eq!(reply.status, 201);
    let (_second, reply) = open(2);
    assert_eq!(reply.status, 201);
    let (mut third, reply) = open(1);
    assert_eq!(
        (reply.status, reply.json()["code"].as_str()),
        (429, Some("too_many_connections"))
    );
    third.expect_end();
    drop((first, third));
    weir.wait_for_metric("weir_connections 1");
    assert_eq!(open(1).1.status, 201);
}
