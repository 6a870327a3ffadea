//! HTTP/2: the meter of frames and the translation of heads, for any bytes; and whole connections of a running node,
//! made of frames that the bytes describe.
//!
//! Of a connection it must hold that no stream has two answers, and that what is accepted is what the DATA of that
//! stream says, no more and no less. Whether each stream has an answer is not asked: a connection may end before.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Request};
use weir::http::frames::{
    DATA, END_HEADERS, END_STREAM, Frame, FrameMeter, GOAWAY, HEADERS, PREFACE, RST_STREAM,
    SETTINGS, Scanner,
};
use weir::http::{h1, h2};
use weir::limits::HEAD_SIZE_MAX;

use super::{http1, naive, node};

const PING: u8 = 6;
const ACK: u8 = 1;
const PADDED: u8 = 8;

pub fn check(bytes: &[u8]) {
    frames(bytes);
    head(bytes);
    connection(bytes);
}

/// The scanner and the meter see the same however the bytes are cut, and the same as a naive reader.
fn frames(bytes: &[u8]) {
    let scan = |cuts: &[usize]| {
        let (mut scanner, mut frames) = (Scanner::default(), Vec::new());
        let mut meter = FrameMeter::new(0);
        let mut flood = Ok(());
        let mut begin = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            scanner.scan(&bytes[begin..end], |frame| frames.push(*frame));
            flood = flood.and(meter.received(&bytes[begin..end], 0));
            begin = end;
        }
        (frames, flood, meter.header_blocks())
    };
    let whole = scan(&[]);
    let cuts: Vec<usize> = http1::cuts(bytes).collect();
    let single: Vec<usize> = (0..bytes.len().min(2_000)).collect();
    assert_eq!(scan(&cuts), whole);
    assert_eq!(scan(&single), whole);
    assert_eq!(whole.0, naive_frames(bytes));
}

fn naive_frames(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let [high, middle, low, kind, flags, _, _, _, _, rest @ ..] = bytes {
        let size = u32::from_be_bytes([0, *high, *middle, *low]) as usize;
        let start_size = size.min(8);
        let Some(payload_start) = rest.get(..start_size) else {
            break;
        };
        let mut start = [0; 8];
        start[..start_size].copy_from_slice(payload_start);
        frames.push(Frame {
            kind: *kind,
            flags: *flags,
            size,
            start,
        });
        bytes = rest.get(size..).unwrap_or(&[]);
    }
    frames
}

/// A request whose parts are the lines of the input: whatever becomes of its head, nothing in it is put right.
fn head(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let method = lines.next().unwrap_or(b"");
    let uri = lines.next().unwrap_or(b"");
    let mut request = Request::builder().method(method).uri(uri);
    for line in lines.take(100) {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(0);
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line.get(colon + 1..).unwrap_or(b""));
        if let (Ok(name), Ok(value)) = (name, value) {
            request = request.header(name, value);
        }
    }
    let Ok(request) = request.body(()) else {
        return;
    };
    let (parts, ()) = request.into_parts();
    let mut text = vec![0; HEAD_SIZE_MAX];
    let Ok(head) = h2::head(&parts, true, &mut text) else {
        return;
    };
    assert_eq!(h1::parse(&text[..head.size]), Ok(Some(head.clone())));
    for (name, value) in &parts.headers {
        if parts.headers.get_all(name).iter().count() == 1 {
            let found = h1::field(&text[..head.size], name.as_str());
            assert_eq!(found, Ok(Some(value.as_bytes())), "{name}");
        }
    }
    let path = parts.uri.path().as_bytes();
    assert!(head.path.is_empty() || text[head.path.clone()] == *path);
}

/// One node for all inputs.
fn address() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        node::start(
            "http2 = true\n",
            "[http2]\nconnections = 64\nstreams = 16\nwindow = \"16KiB\"\n",
        )
    })
}

/// `POST /`, scheme `http`, authority `a`, as literals without indexing (RFC 7541 §6.2.2).
const POST: &[u8] =
    b"\x00\x07:method\x04POST\x00\x07:scheme\x04http\x00\x05:path\x01/\x00\x0a:authority\x01a";

/// What was sent to one stream.
#[derive(Default)]
struct Sent {
    body: Vec<u8>,
    ended: bool,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend_from_slice(&[kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The frames that the bytes describe: kind, flags, stream and size in a byte each, then the payload. A kind of 16 or
/// more is a POST, so that not every input has to find HPACK first. What each stream was sent by them.
fn script(mut bytes: &[u8]) -> (Vec<u8>, BTreeMap<u32, Sent>) {
    let mut wire = Vec::new();
    let mut streams: BTreeMap<u32, Sent> = BTreeMap::new();
    while let [kind, flags, stream, size, rest @ ..] = bytes {
        let (payload, rest) = rest.split_at(rest.len().min(usize::from(*size)));
        bytes = rest;
        let stream = u32::from(*stream % 32);
        let (kind, flags, payload) = match *kind {
            16.. => (HEADERS, END_HEADERS | flags & END_STREAM, POST),
            kind => (kind, *flags, payload),
        };
        wire.extend(frame(kind, flags, stream, payload));
        let sent = streams.entry(stream).or_default();
        if sent.ended {
            continue;
        }
        if kind == DATA {
            // RFC 9113 §6.1.
            let content = match payload {
                [padding, rest @ ..] if flags & PADDED != 0 => {
                    &rest[..rest.len().saturating_sub(usize::from(*padding))]
                }
                payload => payload,
            };
            sent.body.extend_from_slice(content);
        }
        sent.ended = matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0;
    }
    (wire, streams)
}

/// Reads frames until one is wanted, or the stream ends.
fn read_until(
    socket: &mut TcpStream,
    received: &mut Vec<(Frame, u32, Vec<u8>)>,
    wanted: impl Fn(&Frame) -> bool,
) -> bool {
    loop {
        let mut header = [0; 9];
        if socket.read_exact(&mut header).is_err() {
            return false;
        }
        let size = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let mut payload = vec![0; size];
        if socket.read_exact(&mut payload).is_err() {
            return false;
        }
        let frame = naive_frames(&[&header[..], &payload].concat())[0];
        let stream = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
        received.push((frame, stream, payload));
        if wanted(&frame) {
            return true;
        }
    }
}

fn connection(bytes: &[u8]) {
    let (wire, streams) = script(bytes);
    let mut socket = TcpStream::connect(address()).expect("the node accepts");
    let _ = socket.set_nodelay(true);
    let _ = socket.set_read_timeout(Some(Duration::from_secs(60)));
    let mut stream = PREFACE.to_vec();
    stream.extend(frame(SETTINGS, 0, 0, b""));
    stream.extend(wire);
    let mut begin = 0;
    for end in http1::cuts(&stream).chain([stream.len()]) {
        if socket.write_all(&stream[begin..end]).is_err() {
            break;
        }
        begin = end;
    }
    // Once the second is answered, so are the requests before the first. A frame that is begun and not ended, or a header
    // block, has no answer to wait for: the end of the stream ends it.
    let mut received = Vec::new();
    let is_whole = |stream: &[u8]| {
        naive_frames(stream)
            .iter()
            .map(|frame| 9 + frame.size)
            .sum::<usize>()
            == stream.len()
    };
    let mut waits = is_whole(&stream[PREFACE.len()..]);
    for _ in 0..2 {
        waits = waits
            && socket.write_all(&frame(PING, 0, 0, b"answered")).is_ok()
            && read_until(&mut socket, &mut received, |frame| {
                frame.kind == GOAWAY
                    || (frame.kind == PING && frame.flags & ACK != 0 && frame.start == *b"answered")
            });
    }
    let _ = socket.shutdown(Shutdown::Write);
    read_until(&mut socket, &mut received, |_| false);
    answers(&received, &streams, || bytes.escape_ascii().to_string());
}

/// Holds what came back against what was sent.
fn answers(
    received: &[(Frame, u32, Vec<u8>)],
    streams: &BTreeMap<u32, Sent>,
    context: impl Fn() -> String,
) {
    let mut contents: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut ended = Vec::new();
    for (frame, stream, payload) in received {
        if !matches!(frame.kind, DATA | HEADERS | RST_STREAM) {
            continue;
        }
        assert!(
            frame.kind == RST_STREAM || !ended.contains(stream),
            "{stream} is answered twice: {}",
            context()
        );
        if frame.kind == DATA {
            contents.entry(*stream).or_default().extend(payload);
        }
        if frame.kind != RST_STREAM && frame.flags & END_STREAM != 0 {
            ended.push(*stream);
        }
    }
    for (stream, content) in contents {
        let text = std::str::from_utf8(&content).unwrap_or("");
        let accepted = text
            .strip_prefix("{\"accepted\":")
            .and_then(|text| text.strip_suffix("}\n"))
            .map(|count| count.parse::<usize>().expect("a count"));
        let is_refused = text.starts_with("{\"code\":\"json_") || text.contains("\"empty_body\"");
        if accepted.is_none() && !is_refused {
            continue;
        }
        let sent = &streams[&stream];
        assert!(sent.ended, "{stream} had not ended: {}", context());
        let records = naive::records(&sent.body);
        let records = records.ok().map(|records| records.len());
        assert_eq!(accepted, records, "{stream}: {}", context());
    }
}
