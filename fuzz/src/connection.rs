//! A whole connection: any bytes, cut anywhere, into a running node; its answers against a strict reading of the same
//! bytes.
//!
//! The answers are walked beside the stream. One that stays in sync takes one request of the stream, which has to be
//! there in full; one that closes is the last. So there are never two answers for one request and never none, and what
//! was accepted is what the reference would take, no more and no less.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use super::{http1, naive, node, reference};

/// The largest request that the node takes.
const SLAB_SIZE_MAX: usize = 64 * 1024;

/// One node for all inputs.
fn address() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| node::start("", ""))
}

/// Sends `stream` in pieces and ends it; everything that came back.
fn exchange(stream: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address()).expect("the node accepts");
    let _ = socket.set_nodelay(true);
    let _ = socket.set_read_timeout(Some(Duration::from_secs(60)));
    let mut begin = 0;
    for end in http1::cuts(stream).chain([stream.len()]) {
        // The node may have closed already.
        if socket.write_all(&stream[begin..end]).is_err() {
            break;
        }
        begin = end;
    }
    let _ = socket.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    socket
        .read_to_end(&mut answers)
        .expect("an answer, and then the end");
    answers
}

struct Answer {
    status: u16,
    closes: bool,
    accepted: Option<usize>,
}

/// Takes one answer off the front; that to a HEAD which could be read has no content.
fn answer(rest: &mut &[u8], to_head: bool) -> Answer {
    let end = rest
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap_or_else(|| panic!("an incomplete answer: {}", rest.escape_ascii()));
    let head = std::str::from_utf8(&rest[..end]).expect("an answer is ASCII");
    let status = head
        .strip_prefix("HTTP/1.1 ")
        .and_then(|head| head.get(..3))
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no status: {head}"));
    let field = |name: &str| {
        head.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let size = match field("Content-Length") {
        Some(size) if !(to_head && status == 405) => size.parse().expect("a length"),
        _ => 0,
    };
    let content = &rest[end + 4..end + 4 + size];
    let answer = Answer {
        status,
        closes: field("Connection") == Some("close"),
        accepted: std::str::from_utf8(content)
            .ok()
            .and_then(|content| content.strip_prefix("{\"accepted\":"))
            .and_then(|content| content.strip_suffix("}\n"))
            .map(|count| count.parse().expect("a count")),
    };
    *rest = &rest[end + 4 + size..];
    answer
}

pub fn check(stream: &[u8]) {
    let answers = exchange(stream);
    let mut left = answers.as_slice();
    let mut begin = 0;
    let context = || {
        format!(
            "{} answered {}",
            stream.escape_ascii(),
            answers.escape_ascii()
        )
    };
    while !left.is_empty() {
        let request = reference::request(&stream[begin..]);
        let answer = answer(&mut left, stream[begin..].starts_with(b"HEAD "));
        if answer.status == 100 {
            continue;
        }
        assert_eq!(
            answer.accepted.is_some(),
            answer.status == 201,
            "{}",
            context()
        );
        // Exactly what the reference would take is taken, as far as a slab holds it.
        let expected = match &request {
            Ok(request) if request.storable && request.size <= SLAB_SIZE_MAX => {
                let records = naive::records(&request.body);
                records.ok().map(|records| records.len())
            }
            _ => None,
        };
        assert_eq!(answer.accepted, expected, "{}", context());
        if answer.closes {
            assert!(left.is_empty(), "an answer after the last: {}", context());
            return;
        }
        match request {
            Ok(request) => begin += request.size,
            // The connection goes on behind a body that never came in full: nothing follows.
            Err(_) => {
                assert!(
                    answer.accepted.is_none() && left.is_empty(),
                    "{}",
                    context()
                );
                return;
            }
        }
    }
    assert_eq!(
        begin,
        stream.len(),
        "a request without an answer: {}",
        context()
    );
}
