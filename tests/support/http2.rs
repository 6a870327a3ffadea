//! HTTP/2 for tests: the `h2` crate as an honest client, and raw frames for everything else.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, StatusCode};

use super::PATIENCE;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// RFC 9113 §7.
pub const NO_ERROR: u32 = 0;
pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Runs a test that is asynchronous, for as long as a test may take.
pub fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            tokio::time::timeout(PATIENCE, test).await.expect("an end");
        });
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn code(&self) -> String {
        let json: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        json["code"].as_str().unwrap_or("").to_owned()
    }
}

/// A connection of the `h2` crate; its end is the second part.
pub async fn connect(
    address: SocketAddr,
) -> (
    SendRequest<Bytes>,
    tokio::task::JoinHandle<Result<(), h2::Error>>,
) {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    (client, tokio::spawn(connection))
}

/// POSTs a body, as fast as the windows allow.
pub async fn post(
    client: &SendRequest<Bytes>,
    path: &str,
    body: impl Into<Bytes>,
) -> Result<Answer, h2::Error> {
    let request = Request::post(format!("http://test{path}"));
    send(client, request.body(()).unwrap(), body.into(), None).await
}

/// Sends a request and reads its answer.
pub async fn send(
    client: &SendRequest<Bytes>,
    request: Request<()>,
    mut body: Bytes,
    trailers: Option<HeaderMap>,
) -> Result<Answer, h2::Error> {
    let mut client = client.clone().ready().await?;
    let has_body = !body.is_empty() || trailers.is_some();
    let (response, mut stream) = client.send_request(request, !has_body)?;
    let sending = async {
        while !body.is_empty() {
            stream.reserve_capacity(body.len());
            let capacity = std::future::poll_fn(|context| stream.poll_capacity(context)).await;
            // Answered before the end of the body.
            let Some(Ok(size)) = capacity else { return };
            let part = body.split_to(size.min(body.len()));
            let ends = body.is_empty() && trailers.is_none();
            if stream.send_data(part, ends).is_err() {
                return;
            }
        }
        if let Some(trailers) = trailers {
            let _ = stream.send_trailers(trailers);
        }
    };
    let receiving = async {
        let (parts, mut content) = response.await?.into_parts();
        let mut text = Vec::new();
        while let Some(part) = content.data().await {
            let part = part?;
            content.flow_control().release_capacity(part.len())?;
            text.extend_from_slice(&part);
        }
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(text).unwrap(),
        })
    };
    tokio::join!(sending, receiving).1
}

/// One frame as it stands on the wire.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    let mut bytes = size.to_be_bytes()[1..].to_vec();
    bytes.extend_from_slice(&[kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A header block of literals without indexing (RFC 7541 §6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            // RFC 7541 §5.1: an integer with a prefix of seven bits.
            let size = text.len();
            if size < 127 {
                bytes.push(size as u8);
            } else {
                bytes.push(127);
                let mut rest = size - 127;
                while rest >= 128 {
                    bytes.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                bytes.push(rest as u8);
            }
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    bytes
}

/// The pseudo-header fields of a POST, and `more`.
pub fn post_block(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let pseudo = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
    ];
    block(&[&pseudo, more].concat())
}

/// HEADERS of a POST that has a body.
pub fn post_headers(stream: u32, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &post_block(path, more))
}

/// A frame that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Received {
    /// The error code of RST_STREAM and GOAWAY.
    pub fn error_code(&self) -> Option<u32> {
        let code = match self.kind {
            RST_STREAM => self.payload.get(..4)?,
            GOAWAY => self.payload.get(4..8)?,
            _ => return None,
        };
        Some(u32::from_be_bytes(code.try_into().unwrap()))
    }

    fn number(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }
}

/// A client that sends exactly the frames it is told to.
pub struct Raw {
    pub stream: TcpStream,
    received: Vec<u8>,
    /// What may be sent, by stream; 0 is the connection. As announced in SETTINGS and WINDOW_UPDATE so far.
    pub windows: HashMap<u32, i64>,
    pub initial_window: i64,
}

impl Raw {
    /// Connects, and sends nothing.
    pub fn connect(address: SocketAddr) -> Raw {
        Self::over(TcpStream::connect(address).unwrap())
    }

    fn over(stream: TcpStream) -> Raw {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Raw {
            stream,
            received: Vec::new(),
            windows: HashMap::from([(0, 65_535)]),
            initial_window: 65_535,
        }
    }

    /// Connects with room for little that is not read.
    pub fn connect_with_small_buffer(address: SocketAddr) -> Raw {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            None,
        )
        .unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(&address.into()).unwrap();
        Self::over(socket.into())
    }

    /// Connects with empty SETTINGS, and waits until they are acknowledged.
    pub fn open(address: SocketAddr) -> Raw {
        Self::open_with(address, b"")
    }

    /// Connects with these SETTINGS.
    pub fn open_with(address: SocketAddr, settings: &[u8]) -> Raw {
        let mut raw = Self::connect(address);
        raw.send(PREFACE);
        raw.send(&frame(SETTINGS, 0, 0, settings));
        raw.until(|frame| frame.kind == SETTINGS && frame.flags == ACK);
        raw.send(&frame(SETTINGS, ACK, 0, b""));
        // Once this is answered, so are the settings.
        raw.send(&frame(PING, 0, 0, b"settings"));
        raw.until(|frame| frame.kind == PING);
        raw
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends over and over, until the peer has closed or `count` are sent; whether the peer closed.
    pub fn flood(&mut self, bytes: &[u8], count: usize) -> bool {
        for _ in 0..count {
            match self.stream.write_all(bytes) {
                Ok(()) => {}
                Err(error) => {
                    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
                    assert!(kinds.contains(&error.kind()), "{error}");
                    return true;
                }
            }
        }
        false
    }

    /// The next frame; `None` at the end of the stream.
    pub fn next(&mut self) -> Option<Received> {
        let header = self.take(9)?;
        let size = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let stream = u32::from_be_bytes(header[5..9].try_into().unwrap());
        let payload = self.take(size)?;
        let frame = Received {
            kind: header[3],
            flags: header[4],
            stream,
            payload,
        };
        if frame.kind == WINDOW_UPDATE {
            let initial = self.initial_window;
            let window = self.windows.entry(frame.stream).or_insert(initial);
            *window += i64::from(frame.number());
        }
        if frame.kind == SETTINGS && frame.flags != ACK {
            for setting in frame.payload.chunks(6) {
                if setting[..2] == [0, 4] {
                    self.initial_window =
                        u32::from_be_bytes(setting[2..].try_into().unwrap()).into();
                }
            }
        }
        Some(frame)
    }

    fn take(&mut self, size: usize) -> Option<Vec<u8>> {
        while self.received.len() < size {
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(size) => self.received.extend_from_slice(&piece[..size]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("nothing came: {error}"),
            }
        }
        Some(self.received.drain(..size).collect())
    }

    /// Reads until a frame is wanted; that frame.
    pub fn until(&mut self, mut is_wanted: impl FnMut(&Received) -> bool) -> Received {
        loop {
            let frame = self.next().expect("a frame, not the end of the stream");
            if is_wanted(&frame) {
                return frame;
            }
        }
    }

    /// Reads to the end; the error code of the last GOAWAY, if there was one.
    pub fn go_away(&mut self) -> Option<u32> {
        let mut code = None;
        while let Some(frame) = self.next() {
            if frame.kind == GOAWAY {
                code = frame.error_code();
            }
        }
        code
    }

    /// Reads until the stream ends, by its last frame or by a reset: what its answer said, and the reset's error code.
    pub fn answer(&mut self, stream: u32) -> (String, Option<u32>) {
        let mut body = Vec::new();
        loop {
            let frame = self
                .next()
                .unwrap_or_else(|| panic!("no answer to {stream}"));
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                RST_STREAM => return (text(body), frame.error_code()),
                DATA => body.extend_from_slice(&frame.payload),
                _ => {}
            }
            if matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0 {
                return (text(body), None);
            }
        }
    }

    /// Sends DATA that does not end the stream, in frames of the largest size; the caller knows that the windows allow it.
    pub fn send_body_part(&mut self, stream: u32, body: &[u8]) {
        let initial = self.initial_window;
        *self.windows.entry(stream).or_insert(initial) -= body.len() as i64;
        *self.windows.get_mut(&0).unwrap() -= body.len() as i64;
        for part in body.chunks(16 * 1024) {
            self.send(&frame(DATA, 0, stream, part));
        }
    }

    /// Sends a body that nobody may want: as much as the windows allow without waiting.
    pub fn send_body_until_answered(&mut self, stream: u32, body: &[u8]) {
        let initial = self.initial_window;
        let window = *self.windows.entry(stream).or_insert(initial);
        let size = body.len().min(window.min(self.windows[&0]).max(0) as usize);
        self.send_body_part(stream, &body[..size]);
    }

    /// Sends a body within the windows, in frames of up to `size` bytes.
    pub fn send_body(&mut self, stream: u32, mut body: &[u8], size: usize) {
        while !body.is_empty() {
            let initial = self.initial_window;
            let window = *self.windows.entry(stream).or_insert(initial);
            let allowed = window.min(self.windows[&0]).max(0) as usize;
            if allowed == 0 {
                self.next().expect("a frame, not the end of the stream");
                continue;
            }
            let (part, rest) = body.split_at(body.len().min(size).min(allowed));
            body = rest;
            let flags = if body.is_empty() { END_STREAM } else { 0 };
            self.send(&frame(DATA, flags, stream, part));
            *self.windows.get_mut(&stream).unwrap() -= part.len() as i64;
            *self.windows.get_mut(&0).unwrap() -= part.len() as i64;
        }
    }

    pub fn end(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

fn text(body: Vec<u8>) -> String {
    String::from_utf8(body).unwrap()
}
