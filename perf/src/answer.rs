//! One HTTP/1.1 answer, read in as many pieces as the socket gives it.
//!
//! Used by `client`, one reader per connection, reused for every answer; allocates once, when it is made.
//! Does no I/O: the caller reads into [`AnswerReader::space`] and says how much arrived.
//!
//! Invariant: the head lies whole in the buffer; of the body, what fits lies behind it and the rest is only counted.
//! Not here: chunked answers and answers that end with the connection. The server under test sends neither.

use std::fmt;

/// Large enough for the head of any answer expected here.
const BUFFER_SIZE: usize = 1024;
const HEADERS_MAX: usize = 24;

pub struct AnswerReader {
    buffer: Box<[u8]>,
    /// Bytes of this answer that arrived, also those no longer in the buffer.
    received: usize,
    head: Option<Head>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    size: usize,
    body_size: usize,
    closes: bool,
}

/// A complete answer, borrowed from its reader.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    pub status: u16,
    /// The body, or as much of it as the reader keeps.
    pub body: &'a [u8],
    /// The server said that it ends the connection.
    pub closes: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum AnswerError {
    Malformed(httparse::Error),
    HeadTooLarge,
    LengthMissing,
    LengthInvalid,
    InterimStatus(u16),
    /// More bytes than the one answer that was asked for.
    Surplus,
}

impl fmt::Display for AnswerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AnswerError::Malformed(error) => write!(formatter, "malformed answer head: {error}"),
            AnswerError::HeadTooLarge => {
                write!(formatter, "answer head larger than {BUFFER_SIZE} bytes")
            }
            AnswerError::LengthMissing => formatter.write_str("answer without Content-Length"),
            AnswerError::LengthInvalid => formatter.write_str("answer with a bad Content-Length"),
            AnswerError::InterimStatus(status) => write!(formatter, "unasked interim {status}"),
            AnswerError::Surplus => formatter.write_str("bytes after the answer"),
        }
    }
}

impl AnswerReader {
    pub fn new() -> Self {
        AnswerReader {
            buffer: vec![0; BUFFER_SIZE].into_boxed_slice(),
            received: 0,
            head: None,
        }
    }

    /// Forgets the answer, for the next one.
    pub fn reset(&mut self) {
        self.received = 0;
        self.head = None;
    }

    /// Where the next bytes go; never empty.
    pub fn space(&mut self) -> &mut [u8] {
        // Behind a full buffer only uncounted body can follow: it overwrites body, or is read into the head's own
        // place when the head fills the buffer, after everything in the head was taken out.
        let start = match self.head {
            Some(head) if self.received >= BUFFER_SIZE => head.size % BUFFER_SIZE,
            _ => self.received,
        };
        &mut self.buffer[start..]
    }

    /// Takes note of `count` bytes that were read into [`Self::space`]; gives the answer once it is whole.
    pub fn advance(&mut self, count: usize) -> Result<Option<Answer<'_>>, AnswerError> {
        self.received += count;
        let head = match self.head {
            Some(head) => head,
            None => match parse(&self.buffer[..self.received])? {
                Some(head) => *self.head.insert(head),
                None if self.received == BUFFER_SIZE => return Err(AnswerError::HeadTooLarge),
                None => return Ok(None),
            },
        };
        let size = head.size + head.body_size;
        if self.received > size {
            return Err(AnswerError::Surplus);
        }
        if self.received < size {
            return Ok(None);
        }
        Ok(Some(Answer {
            status: head.status,
            body: &self.buffer[head.size..size.min(BUFFER_SIZE)],
            closes: head.closes,
        }))
    }
}

fn parse(received: &[u8]) -> Result<Option<Head>, AnswerError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let size = match response.parse(received).map_err(AnswerError::Malformed)? {
        httparse::Status::Complete(size) => size,
        httparse::Status::Partial => return Ok(None),
    };
    let status = response.code.unwrap_or(0);
    if status < 200 {
        return Err(AnswerError::InterimStatus(status));
    }
    let mut body_size = None;
    let mut closes = false;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or(AnswerError::LengthInvalid)?;
            body_size = Some(length);
        } else if header.name.eq_ignore_ascii_case("connection") {
            closes = header.value.eq_ignore_ascii_case(b"close");
        }
    }
    // RFC 9112 §6.3: a 204 or 304 has no body, whatever its headers say.
    let body_size = match (status, body_size) {
        (204 | 304, _) => 0,
        (_, Some(length)) => length,
        (_, None) => return Err(AnswerError::LengthMissing),
    };
    Ok(Some(Head {
        status,
        size,
        body_size,
        closes,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces` one read each; the answer's status, kept body and close flag.
    fn read(pieces: &[&[u8]]) -> Result<Option<(u16, Vec<u8>, bool)>, AnswerError> {
        let mut reader = AnswerReader::new();
        for (index, piece) in pieces.iter().enumerate() {
            let mut rest = *piece;
            while !rest.is_empty() {
                let space = reader.space();
                let count = space.len().min(rest.len());
                assert!(count > 0);
                space[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                if let Some(answer) = reader.advance(count)? {
                    assert!(rest.is_empty() && index + 1 == pieces.len(), "too early");
                    return Ok(Some((answer.status, answer.body.to_vec(), answer.closes)));
                }
            }
        }
        Ok(None)
    }

    #[test]
    fn an_answer_is_read_whole_at_every_split_point() {
        let text = b"HTTP/1.1 201 Created\r\nContent-Length: 14\r\n\r\n{\"accepted\":1}";
        for split in 1..text.len() {
            assert_eq!(
                read(&[&text[..split], &text[split..]]),
                Ok(Some((201, b"{\"accepted\":1}".to_vec(), false))),
                "split at {split}"
            );
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(
            read(&bytes),
            Ok(Some((201, b"{\"accepted\":1}".to_vec(), false)))
        );
    }

    #[test]
    fn a_204_has_no_body_and_needs_no_length() {
        let text = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
        assert_eq!(read(&[text]), Ok(Some((204, Vec::new(), true))));
    }

    #[test]
    fn a_body_larger_than_the_buffer_is_counted_to_its_end() {
        for body_size in [0, 1, 900, 1024, 5_000, 100_000] {
            // The second head fills the buffer to its last byte.
            let plain = format!("HTTP/1.1 200 OK\r\nContent-Length: {body_size}\r\n\r\n");
            let padding = "x".repeat(BUFFER_SIZE - plain.len() - "X: \r\n".len());
            let padded = plain.replace("\r\n\r\n", &format!("\r\nX: {padding}\r\n\r\n"));
            assert_eq!(padded.len(), BUFFER_SIZE);
            for head in [plain, padded] {
                let mut text = head.into_bytes();
                text.resize(text.len() + body_size, b'b');
                let (status, body, _) = read(&[&text]).expect("valid").expect("complete");
                assert_eq!(status, 200);
                assert!(body.len() <= body_size);
            }
        }
    }

    #[test]
    fn what_is_not_one_answer_is_an_error() {
        assert_eq!(
            read(&[b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab"]),
            Err(AnswerError::Surplus)
        );
        assert_eq!(
            read(&[b"HTTP/1.1 200 OK\r\n\r\n"]),
            Err(AnswerError::LengthMissing)
        );
        assert_eq!(
            read(&[b"HTTP/1.1 200 OK\r\nContent-Length: +x\r\n\r\n"]),
            Err(AnswerError::LengthInvalid)
        );
        assert_eq!(
            read(&[b"HTTP/1.1 100 Continue\r\n\r\n"]),
            Err(AnswerError::InterimStatus(100))
        );
        assert!(matches!(
            read(&[b"SSH-2.0-x\r\n\r\n"]),
            Err(AnswerError::Malformed(_))
        ));
        let endless = [
            b"HTTP/1.1 200 OK\r\nX: ".as_slice(),
            &[b'y'; 2 * BUFFER_SIZE],
        ]
        .concat();
        assert_eq!(read(&[&endless]), Err(AnswerError::HeadTooLarge));
    }
}
