//! A session against rustls's own client, and against one that makes its records by hand.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use proptest::prelude::*;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, RootCertStore,
    SupportedProtocolVersion,
};

use super::*;
use crate::config::ListenerTls;
use crate::limits::TLS_PLAINTEXT_SIZE_MAX;

fn configurations() -> (Arc<ServerConfig>, ClientConfig) {
    configurations_of(&[&TLS13, &TLS12])
}

/// A server's configuration from files, and a client's that believes it and speaks these versions.
fn configurations_of(
    versions: &[&'static SupportedProtocolVersion],
) -> (Arc<ServerConfig>, ClientConfig) {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = (directory.path().join("c"), directory.path().join("k"));
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    let loaded = files::load(&ListenerTls {
        certificate,
        key,
        client: None,
    });
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = rustls::crypto::CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ],
        ..default_provider()
    };
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    (loaded.unwrap().config, client)
}

fn taken(client: &mut ClientConnection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// What the session has to say goes to the client.
fn hand_over(session: &mut Session, client: &mut ClientConnection) {
    let outgoing = std::mem::take(session.outgoing());
    let mut unread = &outgoing[..];
    while !unread.is_empty() {
        client.read_tls(&mut unread).unwrap();
        client.process_new_packets().unwrap();
    }
}

/// Both, after their handshake.
fn handshaken(server: Arc<ServerConfig>, client: ClientConfig) -> (Session, ClientConnection) {
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut session = Session::new(server).unwrap();
    while client.is_handshaking() || !session.handshaken() {
        let mut bytes = taken(&mut client);
        let opened = session.open(&mut bytes).unwrap();
        assert_eq!(opened, Opened::default());
        hand_over(&mut session, &mut client);
    }
    (session, client)
}

/// Records of an established connection, made by hand.
struct Forger {
    key: LessSafeKey,
    iv: Vec<u8>,
    sequence: u64,
}

impl Forger {
    fn new(client: ClientConnection) -> Forger {
        let secrets = client.dangerous_extract_secrets().unwrap();
        let (sequence, ConnectionTrafficSecrets::Aes128Gcm { key, iv }) = secrets.tx else {
            panic!("there is one suite");
        };
        let key = UnboundKey::new(&AES_128_GCM, key.as_ref()).unwrap();
        Forger {
            key: LessSafeKey::new(key),
            iv: iv.as_ref().to_vec(),
            sequence,
        }
    }

    /// RFC 8446 §5.2 and §5.3.
    fn record(&mut self, content_type: u8, content: &[u8]) -> Vec<u8> {
        let mut inner = [content, &[content_type]].concat();
        let length = (inner.len() + AES_128_GCM.tag_len()) as u16;
        let [high, low] = length.to_be_bytes();
        let header = [23, 3, 3, high, low];
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.sequence.to_be_bytes());
        nonce
            .iter_mut()
            .zip(&self.iv)
            .for_each(|(byte, iv)| *byte ^= iv);
        self.sequence += 1;
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.key
            .seal_in_place_append_tag(nonce, Aad::from(header), &mut inner)
            .unwrap();
        [&header[..], &inner].concat()
    }
}

const HANDSHAKE: u8 = 22;
const APPLICATION: u8 = 23;

/// KeyUpdate, with an update requested in return (RFC 8446 §4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 1];

#[test]
fn a_part_of_a_handshake_message_after_the_handshake_ends_the_session() {
    let (server, client) = configurations();
    let parts: [&[u8]; 4] = [&[], &KEY_UPDATE[..1], &KEY_UPDATE[..4], &[0, 1, 0, 0, 9, 9]];
    for part in parts {
        for together in [false, true] {
            let (mut session, client) = handshaken(server.clone(), client.clone());
            let mut forger = Forger::new(client);
            let mut bytes = forger.record(HANDSHAKE, part);
            if together {
                bytes.extend(forger.record(APPLICATION, b"after"));
            }
            let outcome = session.open(&mut bytes);
            assert!(outcome.is_err(), "{part:?}: {outcome:?}");
            // What the connection does next: it answers, says farewell, or reads on.
            assert_eq!(session.seal(b"answer"), Err(TlsError::Failed));
            session.close_notify();
            assert_eq!(session.open(&mut []), Err(TlsError::Failed));
        }
    }
}

#[test]
fn keys_are_renewed_when_the_peer_asks() {
    let (server, client) = configurations();
    let (mut session, mut client) = handshaken(server, client);
    for round in 0..3 {
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"after").unwrap();
        let mut bytes = taken(&mut client);
        let opened = session.open(&mut bytes).unwrap();
        assert_eq!(&bytes[..opened.plaintext], b"after", "round {round}");
        session.seal(b"answer").unwrap();
        hand_over(&mut session, &mut client);
        let mut answer = [0; 6];
        client.reader().read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
}

#[test]
fn nothing_follows_the_end_of_the_stream() {
    let (server, client) = configurations();
    let (mut session, mut client) = handshaken(server, client);
    client.writer().write_all(b"last").unwrap();
    client.send_close_notify();
    let mut bytes = taken(&mut client);
    bytes.extend_from_slice(b"what is no record");
    let opened = session.open(&mut bytes).unwrap();
    assert_eq!((&bytes[..opened.plaintext], opened.tail), (&b"last"[..], 0));
    assert!(opened.ended && session.ended());
    let again = session.open(&mut bytes).unwrap();
    assert_eq!((again.plaintext, again.tail, again.ended), (0, 0, true));
    // The other direction is open.
    session.seal(b"answer").unwrap();
    session.close_notify();
    hand_over(&mut session, &mut client);
    let mut answer = String::new();
    client.reader().read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn what_cannot_be_a_record_is_refused_at_its_header() {
    let (server, client) = configurations();
    for header in [[23, 3, 3, 0xff, 0xff], [99, 3, 3, 0, 1], [23, 9, 3, 0, 1]] {
        let (mut session, _) = handshaken(server.clone(), client.clone());
        let mut bytes = header;
        assert!(session.open(&mut bytes).is_err(), "{header:?}");
    }
    // One of the largest size is waited for.
    let (mut session, _) = handshaken(server, client);
    let [high, low] = ((TLS_RECORD_SIZE_MAX - TLS_HEADER_SIZE) as u16).to_be_bytes();
    let opened = session.open(&mut [23, 3, 3, high, low]).unwrap();
    assert_eq!((opened.plaintext, opened.tail), (0, 5));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the sizes of records and pieces: the plaintext is what was sent, and each byte is in the plaintext or in
    /// the tail.
    #[test]
    fn plaintext_is_what_was_sent(
        sizes in prop::collection::vec(0_usize..40_000, 1..6),
        fragment in 33_usize..TLS_PLAINTEXT_SIZE_MAX,
        piece in 1_usize..50_000,
        version_is_12: bool,
    ) {
        let versions = match version_is_12 {
            true => [&TLS12],
            false => [&TLS13],
        };
        let (server, mut client) = configurations_of(&versions);
        client.max_fragment_size = Some(fragment);
        let (mut session, mut client) = handshaken(server, client);
        client.set_buffer_limit(None);
        let sent: Vec<u8> = (0..sizes.iter().sum()).map(|at: usize| at as u8).collect();
        let mut begin = 0;
        for size in sizes {
            client.writer().write_all(&sent[begin..begin + size]).unwrap();
            begin += size;
        }
        let ciphertext = taken(&mut client);
        let mut received = Vec::new();
        let mut tail = Vec::new();
        for piece in ciphertext.chunks(piece) {
            let mut bytes = [&tail[..], piece].concat();
            let opened = session.open(&mut bytes).unwrap();
            prop_assert!(opened.plaintext + opened.tail <= bytes.len());
            received.extend_from_slice(&bytes[..opened.plaintext]);
            tail = bytes[opened.plaintext..][..opened.tail].to_vec();
        }
        prop_assert!(tail.is_empty());
        prop_assert_eq!(received, sent);
    }

    /// No input makes it panic, before the handshake or after.
    #[test]
    fn garbage_is_an_error_or_waited_for(
        garbage in prop::collection::vec(any::<u8>(), 0..400),
        content_type in 20_u8..25,
        after: bool,
    ) {
        let (server, client) = configurations();
        let mut session = match after {
            true => handshaken(server, client).0,
            false => Session::new(server).unwrap(),
        };
        let length = (garbage.len() as u16).to_be_bytes();
        let mut bytes = [&[content_type, 3, 3], &length[..], &garbage].concat();
        if let Ok(opened) = session.open(&mut bytes) {
            prop_assert_eq!(opened.plaintext, 0);
            if session.handshaken() {
                prop_assert!(session.seal(b"answer").is_ok());
            }
        }
        session.close_notify();
    }
}
