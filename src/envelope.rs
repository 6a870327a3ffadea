//! Envelopes: what turns a record into a row.
//!
//! Before it: a checked body and the path it was sent to.
//! After it: [`crate::encoder`] puts `prefix + record + suffix` into the upload buffer.
//! Thread: one reactor. Allocates: never; the encoder keeps one frame and composes it anew.
//! Invariant: the tag is data only; no table, database, file or field name ever comes from a request.
//! Not here: the record itself, which is passed on byte for byte.

use crate::clock::Rfc3339Millis;
use crate::config::Envelope;
use crate::limits::{ENVELOPE_SIZE_MAX, TAG_SIZE_MAX};

/// The bytes around every record of one request.
pub struct Frame {
    prefix: [u8; ENVELOPE_SIZE_MAX],
    prefix_size: usize,
    suffix: &'static [u8],
}

impl Frame {
    /// A frame that adds nothing but the end of the line.
    pub fn new() -> Self {
        Frame {
            prefix: [0; ENVELOPE_SIZE_MAX],
            prefix_size: 0,
            suffix: b"\n",
        }
    }

    /// Becomes the frame for a request to `path`, received at `timestamp`.
    pub fn compose(
        &mut self,
        envelope: Envelope,
        path: &[u8],
        default_tag: &str,
        timestamp: &Rfc3339Millis,
    ) {
        self.prefix_size = 0;
        self.suffix = b"\n";
        if envelope == Envelope::FluentBit {
            self.push(b"{\"timestamp\":\"");
            self.push(timestamp);
            self.push(b"\",\"tag\":\"");
            self.push_tag(path, default_tag);
            self.push(b"\",\"log\":");
            self.suffix = b"}\n";
        }
    }

    pub fn prefix(&self) -> &[u8] {
        &self.prefix[..self.prefix_size]
    }

    pub fn suffix(&self) -> &'static [u8] {
        self.suffix
    }

    /// Bytes that the frame adds to a record.
    pub fn size(&self) -> usize {
        self.prefix_size + self.suffix.len()
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.prefix_size + bytes.len();
        self.prefix[self.prefix_size..end].copy_from_slice(bytes);
        self.prefix_size = end;
    }

    /// The incumbent's rule: without the leading slash; whatever is not a letter, a digit, `_` or `.` becomes `_`.
    /// Such a tag needs no escaping. A longer path is cut at [`TAG_SIZE_MAX`].
    fn push_tag(&mut self, path: &[u8], default_tag: &str) {
        match path.strip_prefix(b"/").unwrap_or(path) {
            [] => self.push(default_tag.as_bytes()),
            name => {
                for byte in &name[..name.len().min(TAG_SIZE_MAX)] {
                    let kept = byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.');
                    self.push(&[if kept { *byte } else { b'_' }]);
                }
            }
        }
    }
}

impl Default for Frame {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: &Rfc3339Millis = b"2026-11-23T09:15:02.123Z";

    fn frame(envelope: Envelope, path: &[u8]) -> Frame {
        let mut frame = Frame::new();
        // What an earlier request left must not show.
        frame.compose(Envelope::FluentBit, b"/an/earlier/and/longer/path", "x", AT);
        frame.compose(envelope, path, "http.0", AT);
        frame
    }

    #[test]
    fn the_fluent_bit_envelope_is_the_incumbents() {
        for (path, tag) in [
            ("/", "http.0"),
            ("/app.log", "app.log"),
            ("/a/b-c", "a_b_c"),
            ("/a%20b", "a_20b"),
            ("//x/", "_x_"),
            ("/\"\\", "__"),
        ] {
            let frame = frame(Envelope::FluentBit, path.as_bytes());
            let prefix = std::str::from_utf8(frame.prefix()).unwrap();
            assert_eq!(
                prefix,
                format!("{{\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"{tag}\",\"log\":")
            );
            assert_eq!(frame.suffix(), b"}\n");
            assert_eq!(frame.size(), prefix.len() + 2);
        }
    }

    #[test]
    fn without_an_envelope_the_row_is_the_record() {
        let frame = frame(Envelope::None, b"/x");
        assert_eq!((frame.prefix(), frame.suffix()), (&b""[..], &b"\n"[..]));
    }

    #[test]
    fn the_longest_path_fits() {
        let path = vec![b'/'; crate::limits::HEAD_SIZE_MAX];
        let frame = frame(Envelope::FluentBit, &path);
        assert!(frame.size() <= ENVELOPE_SIZE_MAX);
    }
}
