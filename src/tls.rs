//! TLS, server side: one [`Session`] per connection, its records opened where they lie.
//!
//! Before it: ciphertext was read into a slab, or into the buffer of an HTTP/2 connection.
//! After it: plaintext at the front of the same bytes, and ciphertext to be sent in [`Session::outgoing`].
//! Thread: one reactor per session. Allocates: what rustls does, which is bounded per connection and in the plan: its
//! state at the handshake, and for each call that opens something a buffer of one record.
//! Invariant: no byte of plaintext comes from a record that was not authenticated, and none after the end of the
//! stream; an error is final; after the handshake rustls keeps no part of the input from one call to the next.
//! Not here: sockets, and what the plaintext means.
//!
//! ```text
//! before:  | record | record | … | part of a record |
//! after:   | plaintext | tail: part of a record |          |
//! ```
//!
//! rustls decrypts in place, but lends the plaintext from a buffer of its own and all of the input with it, so the
//! plaintext is copied twice on its way to the front (docs/DECISIONS.md).

pub mod certificate;
mod files;
mod listeners;

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic,
};

pub use files::{HTTP_2, TlsFault};
pub use listeners::{Tls, TlsListener, faults};

use crate::limits::{TLS_HEADER_SIZE, TLS_RECORD_SIZE_MAX};

type Traffic<'c> = WriteTraffic<'c, ServerConnectionData>;

/// One TLS connection, server side.
pub struct Session {
    connection: UnbufferedServerConnection,
    /// Ciphertext to be sent.
    outgoing: Vec<u8>,
    /// Bytes at the start of the tail that rustls has seen, and needs again: parts of a handshake message.
    kept: usize,
    /// The peer's `close_notify` was read.
    ended: bool,
    /// No more can be opened or sealed.
    failed: bool,
}

/// What [`Session::open`] made of the bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of plaintext, at the front.
    pub plaintext: usize,
    /// Bytes of what is not whole yet, right behind the plaintext: to be offered again, with more behind them.
    pub tail: usize,
    /// The peer said that nothing follows (`close_notify`, RFC 8446 §6.1).
    pub ended: bool,
}

/// Why a session failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Protocol(#[from] rustls::Error),
    /// Clients that exist send no handshake message then that would need two records, and what rustls has seen of one
    /// must not be given away before it has seen the rest.
    #[error("a part of a handshake message after the handshake")]
    Fragment,
    #[error("a record longer than {TLS_RECORD_SIZE_MAX} bytes")]
    RecordSize,
    #[error("the traffic keys are used up")]
    KeysExhausted,
    #[error("the session has failed before")]
    Failed,
}

impl Session {
    pub fn new(config: Arc<ServerConfig>) -> Result<Session, TlsError> {
        Ok(Session {
            connection: UnbufferedServerConnection::new(config)?,
            outgoing: Vec::new(),
            kept: 0,
            ended: false,
            failed: false,
        })
    }

    /// Decrypts what is whole in `bytes`, in place; they begin with the tail of the call before.
    ///
    /// What has to be sent in answer, handshake messages and alerts, is in [`Session::outgoing`] then, also after an
    /// error.
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Opened, TlsError> {
        if self.failed {
            return Err(TlsError::Failed);
        }
        let outcome = self.open_records(bytes);
        if outcome.is_err() {
            self.failed = true;
            self.encode_queued();
        }
        outcome
    }

    fn open_records(&mut self, bytes: &mut [u8]) -> Result<Opened, TlsError> {
        let mut plaintext = 0;
        let mut payload = Vec::new();
        let mut begin = 0;
        // rustls is given one record at a time: so it is known what it keeps, and that this is nothing when it is asked
        // to encrypt, for which it wants an input too. Every turn consumes a record or ends.
        while !self.ended {
            let Some(size) = record_size(&bytes[begin + self.kept..])? else {
                break;
            };
            let end = begin + self.kept + size;
            // Every turn takes plaintext, encodes a message or ends.
            loop {
                let UnbufferedStatus { discard, state } =
                    self.connection.process_tls_records(&mut bytes[begin..end]);
                let mut is_done = false;
                match state? {
                    ConnectionState::ReadTraffic(mut traffic) => {
                        while let Some(record) = traffic.next_record() {
                            payload.extend_from_slice(record?.payload);
                        }
                    }
                    ConnectionState::EncodeTlsData(mut message) => {
                        append(&mut self.outgoing, |free| message.encode(free))?;
                    }
                    // It is as good as sent: `outgoing` keeps the order.
                    ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                    ConnectionState::PeerClosed | ConnectionState::Closed => {
                        self.ended = true;
                        is_done = true;
                    }
                    // More input is wanted, or could be written to. Early data is not offered, so there is none.
                    _ => is_done = true,
                }
                begin += discard;
                let plaintext_end = plaintext + payload.len();
                assert!(plaintext_end <= begin, "a plaintext longer than its record");
                bytes[plaintext..plaintext_end].copy_from_slice(&payload);
                plaintext = plaintext_end;
                payload.clear();
                if is_done {
                    break;
                }
            }
            self.kept = end - begin;
            if self.kept > 0 && self.handshaken() {
                return Err(TlsError::Fragment);
            }
        }
        // What follows the end of the stream is nobody's (RFC 8446 §6.1).
        let tail = match self.ended {
            true => 0,
            false => bytes.len() - begin,
        };
        bytes.copy_within(begin..begin + tail, plaintext);
        Ok(Opened {
            plaintext,
            tail,
            ended: self.ended,
        })
    }

    /// Appends records of `plaintext` to what is to be sent; only after the handshake.
    pub fn seal(&mut self, plaintext: &[u8]) -> Result<(), TlsError> {
        assert!(self.handshaken(), "there are no keys before the handshake");
        self.write(|traffic, free| traffic.encrypt(plaintext, free))
    }

    /// Appends the end of the stream to what is to be sent; nothing before the handshake, and after a failure, which
    /// had an alert of its own.
    pub fn close_notify(&mut self) {
        if self.handshaken() {
            // Where it fails, the connection is closed without it.
            let _ = self.write(|traffic, free| traffic.queue_close_notify(free));
        }
    }

    fn write(
        &mut self,
        mut write: impl FnMut(&mut Traffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), TlsError> {
        if self.failed {
            return Err(TlsError::Failed);
        }
        assert!(self.kept == 0, "rustls needs an input that is not here");
        // Every turn encodes a message or ends.
        loop {
            match self.connection.process_tls_records(&mut []).state? {
                ConnectionState::EncodeTlsData(mut message) => {
                    append(&mut self.outgoing, |free| message.encode(free))?;
                }
                ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    return append(&mut self.outgoing, |free| write(&mut traffic, free));
                }
                _ => return Err(TlsError::Failed),
            }
        }
    }

    /// Ciphertext to be sent: handshake messages, tickets, alerts, sealed records. The caller takes it out.
    pub fn outgoing(&mut self) -> &mut Vec<u8> {
        &mut self.outgoing
    }

    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether the peer has said that nothing follows.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether both sides have proved what they have to.
    pub fn handshaken(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// The protocol that was agreed on (RFC 7301); `None` where the client named none.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.connection.alpn_protocol()
    }

    /// The certificate that the client proved to have, once the handshake is done.
    pub fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        self.connection.peer_certificates()?.first()
    }

    /// Encodes what rustls has queued by itself. It looks at no input as long as there is something.
    fn encode_queued(&mut self) {
        while self.connection.wants_write() {
            let status = self.connection.process_tls_records(&mut []);
            let Ok(ConnectionState::EncodeTlsData(mut message)) = status.state else {
                return;
            };
            if append(&mut self.outgoing, |free| message.encode(free)).is_err() {
                return;
            }
        }
    }
}

/// The size of the record at the start of `bytes`, where it is whole. What is no record is all of them: rustls says
/// what is wrong with it.
fn record_size(bytes: &[u8]) -> Result<Option<usize>, TlsError> {
    let Some(header) = bytes.first_chunk::<TLS_HEADER_SIZE>() else {
        return Ok(None);
    };
    // RFC 8446 §5.1: ContentType, legacy_record_version, length.
    let [content_type, version_major, _, length @ ..] = *header;
    if !(20..=24).contains(&content_type) || version_major != 3 {
        return Ok(Some(bytes.len()));
    }
    let size = TLS_HEADER_SIZE + usize::from(u16::from_be_bytes(length));
    match size {
        size if size > TLS_RECORD_SIZE_MAX => Err(TlsError::RecordSize),
        size => Ok((size <= bytes.len()).then_some(size)),
    }
}

/// How large the buffer has to be that something did not fit.
trait RequiredSize {
    fn required_size(self) -> Result<usize, TlsError>;
}

impl RequiredSize for EncodeError {
    fn required_size(self) -> Result<usize, TlsError> {
        match self {
            EncodeError::InsufficientSize(error) => Ok(error.required_size),
            EncodeError::AlreadyEncoded => Err(TlsError::Failed),
        }
    }
}

impl RequiredSize for EncryptError {
    fn required_size(self) -> Result<usize, TlsError> {
        match self {
            EncryptError::InsufficientSize(error) => Ok(error.required_size),
            EncryptError::EncryptExhausted => Err(TlsError::KeysExhausted),
        }
    }
}

/// Appends what `write` writes: it says first how much room it needs.
fn append<E: RequiredSize>(
    outgoing: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> Result<(), TlsError> {
    let begin = outgoing.len();
    let written = match write(&mut []) {
        Ok(written) => written,
        Err(error) => {
            let required_size = error.required_size()?;
            outgoing.resize(begin + required_size, 0);
            match write(&mut outgoing[begin..]) {
                Ok(written) => written,
                Err(error) => {
                    outgoing.truncate(begin);
                    return Err(error.required_size().err().unwrap_or(TlsError::Failed));
                }
            }
        }
    };
    outgoing.truncate(begin + written);
    Ok(())
}

#[cfg(test)]
mod tests;
