//! TLS on a listener, with rustls's client: every cut of its records, what ends a connection, certificates that change,
//! and clients that show one.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use rustls::{ClientConfig, ClientConnection, HandshakeKind};
use support::tls::{Authority, Pair, Tunnel, believing, connection};
use support::{
    Client, PATIENCE, Weir, base_config, chunked_request, command, free_address, request,
    run_to_its_end,
};

const TLS: &str = "certificate = \"tls.crt\", key = \"tls.key\"";

/// A weir whose listener has these keys in `tls`, and `more`; the authority that has signed its certificate, number 1.
fn start(tls: &str, more: &str) -> (Weir, Authority) {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    authority.server(1).write(directory.path());
    std::fs::write(directory.path().join("ca.pem"), &authority.pem).unwrap();
    let weir = start_in(directory, tls, more);
    (weir, authority)
}

fn start_in(directory: tempfile::TempDir, tls: &str, more: &str) -> Weir {
    let admin = free_address();
    Weir::start_in(directory, &config(admin, tls, more), admin)
}

fn config(admin: SocketAddr, tls: &str, more: &str) -> String {
    let listener = "address = \"127.0.0.1:0\"\n";
    let config =
        base_config(admin).replacen(listener, &format!("{listener}tls = {{ {tls} }}\n"), 1);
    config + more
}

/// A client of this weir that speaks HTTP through a tunnel.
fn tunnel(weir: &Weir, config: ClientConfig) -> Client {
    Client::connect(Tunnel::open(weir.address, config, 16 * 1024).address)
}

/// All slabs are free again once nobody is connected.
fn assert_slabs_free(weir: &Weir) {
    weir.wait_for_metric("weir_connections 0");
    for (size, count) in [(16 << 10, 64), (256 << 10, 32), (8 << 20, 4)] {
        weir.wait_for_metric(&format!(
            "weir_slabs{{size=\"{size}\",state=\"free\"}} {count}"
        ));
    }
}

/// One TLS connection whose ciphertext the test has in hand.
struct Sealed {
    stream: TcpStream,
    connection: ClientConnection,
    /// Of answers that are not read.
    received: String,
}

impl Sealed {
    fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Result<Sealed, std::io::Error> {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self::over(stream, config)
    }

    fn over(mut stream: TcpStream, config: &Arc<ClientConfig>) -> Result<Sealed, std::io::Error> {
        let mut connection = connection(config);
        while connection.is_handshaking() {
            connection.complete_io(&mut stream)?;
        }
        Ok(Sealed {
            stream,
            connection,
            received: String::new(),
        })
    }

    /// The records of `plaintext`.
    fn seal(&mut self, plaintext: &[u8]) -> Vec<u8> {
        self.connection.set_buffer_limit(None);
        self.connection.writer().write_all(plaintext).unwrap();
        self.taken()
    }

    fn taken(&mut self) -> Vec<u8> {
        let mut ciphertext = Vec::new();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut ciphertext).unwrap();
        }
        ciphertext
    }

    /// The status of the next answer, or why there is none.
    fn status(&mut self) -> Result<u16, std::io::Error> {
        loop {
            if let Some((head, rest)) = self.received.split_once("\r\n\r\n") {
                let (_, length) = head.split_once("Content-Length: ").unwrap();
                let length: usize = length.lines().next().unwrap().parse().unwrap();
                if rest.len() >= length {
                    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                    self.received = rest[length..].to_owned();
                    return Ok(status);
                }
            }
            let mut plaintext = [0; 1024];
            let mut reader = rustls::Stream::new(&mut self.connection, &mut self.stream);
            match reader.read(&mut plaintext)? {
                0 => return Err(std::io::ErrorKind::ConnectionAborted.into()),
                size => self.received += std::str::from_utf8(&plaintext[..size]).unwrap(),
            }
        }
    }

    fn serial(&self) -> u64 {
        let chain = self.connection.peer_certificates().unwrap();
        serial(&chain[0])
    }
}

/// Serial numbers of tests are below 128, so each is one byte: `[0] version, INTEGER` (RFC 5280 §4.1).
fn serial(certificate: &[u8]) -> u64 {
    let version: [u8; 5] = [0xa0, 3, 2, 1, 2];
    let at = certificate
        .windows(version.len())
        .position(|window| window == version)
        .unwrap();
    assert_eq!(certificate[at + 5..at + 7], [2, 1]);
    u64::from(certificate[at + 7])
}

#[test]
fn requests_of_every_kind_are_taken_whatever_the_size_of_a_record() {
    let (weir, authority) = start(TLS, "");
    let large = weir_perf::event::large_event(1, 0);
    let large = large.as_bytes();
    let small = b"{\"a\":1}";
    let mut expected = 0;
    for record_size in [33, 64, 101, 1_023, 4_097, 16_389] {
        let mut config = authority.config(None);
        config.max_fragment_size = Some(record_size);
        let mut client = Sealed::connect(weir.address, &Arc::new(config)).unwrap();
        for wire in [
            request("/a", small),
            request("/a", large),
            chunked_request("/a", large, 9_973),
            chunked_request("/a", small, 1),
            // Its records end anywhere in the next request.
            [request("/a", large), chunked_request("/a", large, 70_001)].concat(),
            [request("/a", small), request("/a", small)].concat(),
        ] {
            let count = wire.windows(5).filter(|window| window == b"POST ").count();
            let ciphertext = client.seal(&wire);
            // Not in step with the records, and so that a part of one is there for a while.
            for piece in ciphertext.chunks(99_991) {
                client.stream.write_all(piece).unwrap();
            }
            for _ in 0..count {
                match client.status() {
                    Ok(status) => assert_eq!(status, 201, "records of {record_size}"),
                    Err(error) => panic!("records of {record_size}: {error}"),
                }
                expected += 1;
            }
        }
    }
    assert_eq!(weir.outcomes(), [expected, 0, 0, 0]);
    assert_slabs_free(&weir);
    assert_eq!(
        weir.stop_delivered().rows("Telemetry", "Events").len() as u64,
        expected
    );
}

#[test]
fn ciphertext_may_come_byte_by_byte_and_requests_before_their_answers() {
    let (weir, authority) = start(TLS, "");
    let mut client = Sealed::connect(weir.address, &Arc::new(authority.config(None))).unwrap();
    for wire in [
        request("/a", b"{\"a\":1}"),
        chunked_request("/a", b"{\"a\":2}", 3),
    ] {
        for byte in client.seal(&wire) {
            client.stream.write_all(&[byte]).unwrap();
        }
        assert_eq!(client.status().unwrap(), 201);
    }
    drop(client);
    let mut client = tunnel(&weir, authority.config(None));
    let wire: Vec<u8> = (0..50)
        .flat_map(|index| request("/a", format!("{{\"n\":{index}}}").as_bytes()))
        .collect();
    client.send(&wire);
    for _ in 0..50 {
        assert_eq!(client.reply().status, 201);
    }
    client
        .send(b"POST /a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 7\r\n\r\n");
    assert_eq!(client.reply().status, 100);
    client.send(b"{\"n\":0}");
    assert_eq!(client.reply().status, 201);
    // A body that nobody wants is dropped to its end, and the connection goes on.
    client.send(&request("/a", &[b' '; 60_000]).replacing(b"POST", b"DELETE"));
    assert_eq!(client.reply().status, 405);
    assert_eq!(client.post("/a", b"{\"n\":1}").status, 201);
    drop(client);
    assert_slabs_free(&weir);
}

trait Replacing {
    fn replacing(self, from: &[u8], to: &[u8]) -> Vec<u8>;
}

impl Replacing for Vec<u8> {
    /// With another start.
    fn replacing(self, from: &[u8], to: &[u8]) -> Vec<u8> {
        [to, self.strip_prefix(from).unwrap()].concat()
    }
}

#[test]
fn the_largest_request_leaves_room_for_a_record() {
    let slabs =
        "[slabs]\nclasses = [{ size = \"16KiB\", count = 4 }, { size = \"256KiB\", count = 2 }]\n";
    let (weir, authority) = start(TLS, slabs);
    let mut client = tunnel(&weir, authority.config(None));
    let sized = |size: usize| {
        let frame = request("/a", b"{}").len() - "2{}".len() + "245000".len();
        let mut body = vec![b' '; size - frame];
        body[..7].copy_from_slice(b"{\"a\":1}");
        let wire = request("/a", &body);
        assert_eq!(wire.len(), size);
        wire
    };
    let most = 256 * 1024 - weir::limits::TLS_RECORD_SIZE_MAX;
    client.send(&sized(most));
    assert_eq!(client.reply().status, 201);
    client.send(&sized(most + 1));
    let reply = client.reply();
    assert_eq!((reply.status, reply.closes()), (413, true), "{reply:?}");
}

#[test]
fn what_is_no_tls_is_told_so() {
    let (weir, _) = start(TLS, "");
    let mut client = weir.connect();
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let reply = client.reply();
    assert_eq!((reply.status, reply.closes()), (400, true));
    assert_eq!(reply.json()["code"], "tls_expected");
    client.expect_end();

    for garbage in [
        &[0_u8; 600][..],
        b"\x16\x03\x01\x00\x05hello",
        b"\x17\x03\x03\x00\x05hello",
        b"\x16\x03\x01\xff\xff",
        b"\x80\x2e\x01\x00\x02 SSLv2",
    ] {
        let mut stream = TcpStream::connect(weir.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        // A fatal alert in clear (RFC 8446 §6), or nothing where the record itself cannot be one.
        assert!(
            answer.is_empty() || (answer.len() == 7 && answer[0] == 21 && answer[5] == 2),
            "{garbage:?}: {answer:?}"
        );
    }
    assert_eq!(weir.metric("weir_tls_handshakes_total"), 0);
    assert_eq!(weir.metric("weir_tls_failures_total"), 6);
    assert_slabs_free(&weir);
}

#[test]
fn a_handshake_has_one_deadline() {
    let (weir, authority) = start(TLS, "[deadlines]\nhandshake = \"300ms\"\n");
    let mut hello = Vec::new();
    let mut silent = connection(&Arc::new(authority.config(None)));
    silent.write_tls(&mut hello).unwrap();
    for size in [0, 1, 200, hello.len()] {
        let mut stream = TcpStream::connect(weir.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&hello[..size]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.is_empty(), size < hello.len(), "{size} bytes");
    }
    assert_eq!(weir.metric("weir_deadlines_passed_total"), 4);
    assert_eq!(weir.outcomes(), [0, 0, 0, 0]);
    assert_slabs_free(&weir);
}

#[test]
fn a_bad_record_gets_an_alert_and_stores_nothing() {
    let (weir, authority) = start(TLS, "");
    let config = Arc::new(authority.config(None));
    for place in [5, 30, usize::MAX] {
        let mut client = Sealed::connect(weir.address, &config).unwrap();
        let mut ciphertext = client.seal(&request("/a", b"{\"a\":1}"));
        let place = place.min(ciphertext.len() - 1);
        ciphertext[place] ^= 1;
        client.stream.write_all(&ciphertext).unwrap();
        let error = client.status().unwrap_err().to_string();
        assert!(error.contains("BadRecordMac"), "{error}");
    }
    assert_eq!(weir.metric("weir_tls_failures_total"), 3);
    assert_slabs_free(&weir);
    assert!(weir.stop().rows_or_none().is_empty());
}

#[test]
fn a_stream_that_is_cut_within_a_body_stores_nothing_whether_it_says_so_or_not() {
    let (weir, authority) = start(TLS, "");
    let config = Arc::new(authority.config(None));
    let wire = request("/a", b"{\"a\":1}");
    for says_so in [false, true] {
        let mut client = Sealed::connect(weir.address, &config).unwrap();
        let mut ciphertext = client.seal(&wire[..wire.len() - 1]);
        if says_so {
            client.connection.send_close_notify();
            ciphertext.extend(client.taken());
        }
        client.stream.write_all(&ciphertext).unwrap();
        if !says_so {
            client.stream.shutdown(Shutdown::Write).unwrap();
        }
        assert_eq!(client.status().unwrap(), 400);
    }
    // One that ends between two requests has its answers.
    let mut client = Sealed::connect(weir.address, &config).unwrap();
    let mut ciphertext = client.seal(&wire);
    client.connection.send_close_notify();
    ciphertext.extend(client.taken());
    client.stream.write_all(&ciphertext).unwrap();
    assert_eq!(client.status().unwrap(), 201);
    assert!(client.status().is_err());
    assert_eq!(weir.outcomes(), [1, 0, 0, 2]);
    assert_slabs_free(&weir);
}

#[test]
fn the_end_of_a_connection_is_said() {
    let (weir, authority) = start(TLS, "[deadlines]\nidle = \"200ms\"\n");
    let config = Arc::new(authority.config(None));
    let ends = |wire: &[u8]| {
        let mut client = Sealed::connect(weir.address, &config).unwrap();
        let ciphertext = client.seal(wire);
        client.stream.write_all(&ciphertext).unwrap();
        let mut plaintext = Vec::new();
        // Without close_notify this is an error.
        rustls::Stream::new(&mut client.connection, &mut client.stream)
            .read_to_end(&mut plaintext)
            .unwrap();
        String::from_utf8(plaintext).unwrap()
    };
    let close =
        b"POST /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 7\r\n\r\n{\"a\":1}";
    assert!(ends(close).starts_with("HTTP/1.1 201 "));
    assert!(ends(&request("/a", b"{\"a\":1}")).starts_with("HTTP/1.1 201 "));
    assert_eq!(ends(b""), "");
    // Row 27.
    assert!(ends(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").starts_with("HTTP/1.1 "));
}

#[test]
fn protocols_are_agreed_on_or_refused() {
    let (weir, authority) = start(TLS, "");
    let agreed = |protocols: &[&str]| {
        let mut config = authority.config(None);
        config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        let client = Sealed::connect(weir.address, &Arc::new(config))?;
        let protocol = client.connection.alpn_protocol();
        Ok::<_, std::io::Error>(protocol.map(|name| String::from_utf8(name.to_vec()).unwrap()))
    };
    assert_eq!(agreed(&[]).unwrap(), None);
    assert_eq!(agreed(&["http/1.1"]).unwrap().unwrap(), "http/1.1");
    assert_eq!(agreed(&["h2", "http/1.1"]).unwrap().unwrap(), "http/1.1");
    let error = agreed(&["spdy/3"]).unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
}

#[test]
fn both_versions_are_spoken_and_sessions_resumed() {
    let (weir, authority) = start(TLS, "");
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(
            authority.roots(),
            provider.clone(),
        );
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_webpki_verifier(verifier.build().unwrap())
            .with_no_client_auth();
        let config = Arc::new(config);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut client = Sealed::connect(weir.address, &config).unwrap();
            assert_eq!(
                client.connection.handshake_kind(),
                Some(kind),
                "{version:?}"
            );
            for _ in 0..2 {
                let ciphertext = client.seal(&request("/a", b"{\"a\":1}"));
                client.stream.write_all(&ciphertext).unwrap();
                assert_eq!(client.status().unwrap(), 201);
            }
        }
    }
}

#[test]
fn a_proxy_says_in_clear_whose_connection_it_is() {
    let proxies = "[[listener]]\naddress = \"127.0.0.1:0\"\nproxies = [\"127.0.0.1\"]\nallow = [\"192.0.2.7\"]\n";
    let admin = free_address();
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    authority.server(1).write(directory.path());
    let listener = "[[listener]]\naddress = \"127.0.0.1:0\"\n";
    let config_text =
        base_config(admin).replacen(listener, &format!("{proxies}tls = {{ {TLS} }}\n"), 1);
    let weir = Weir::start_in(directory, &config_text, admin);
    let config = Arc::new(authority.config(None));
    for (source, status) in [("192.0.2.7", 201), ("192.0.2.8", 403)] {
        let header = format!("PROXY TCP4 {source} 127.0.0.1 1 2\r\n");
        let mut stream = TcpStream::connect(weir.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // In one write with the ClientHello.
        let mut hello = header.into_bytes();
        let mut connection = connection(&config);
        connection.write_tls(&mut hello).unwrap();
        stream.write_all(&hello).unwrap();
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).unwrap();
        }
        let mut client = Sealed {
            stream,
            connection,
            received: String::new(),
        };
        let ciphertext = client.seal(&request("/a", b"{\"a\":1}"));
        client.stream.write_all(&ciphertext).unwrap();
        assert_eq!(client.status().unwrap(), status);
    }
}

#[test]
fn changed_files_are_taken_by_new_connections_and_bad_ones_are_not() {
    let (weir, authority) = start(TLS, "");
    let config = Arc::new(authority.config(None));
    let directory = weir.directory.path().to_owned();
    let mut old = Sealed::connect(weir.address, &config).unwrap();
    assert_eq!(old.serial(), 1);

    authority.server(2).write(&directory);
    let deadline = Instant::now() + PATIENCE;
    // A new client each time: one that resumes sees the certificate it knows.
    let serial = || {
        let config = Arc::new(authority.config(None));
        Sealed::connect(weir.address, &config).unwrap().serial()
    };
    loop {
        // Asked before: this process may be the one that stands still.
        let is_late = Instant::now() > deadline;
        if serial() == 2 {
            break;
        }
        assert!(!is_late, "the new certificate is never used");
    }
    let ciphertext = old.seal(&request("/a", b"{\"a\":1}"));
    old.stream.write_all(&ciphertext).unwrap();
    assert_eq!(old.status().unwrap(), 201);
    assert_eq!(weir.metric("weir_tls_reloads_total"), 1);

    // A certificate without its key.
    std::fs::write(directory.join("tls.crt"), authority.server(3).certificate).unwrap();
    weir.wait_for_metric("weir_tls_reload_failures_total 1");
    assert_eq!(serial(), 2);
    assert_eq!(weir.metric("weir_tls_reloads_total"), 1);
    authority.server(4).write(&directory);
    weir.wait_for_metric("weir_tls_reloads_total 2");
    assert_eq!(serial(), 4);
    let page = weir.metrics();
    // rcgen's default.
    let expiry = "weir_tls_certificate_expiry_seconds{listener=\"127.0.0.1:0\"} 67090";
    assert!(page.lines().any(|line| line.starts_with(expiry)), "{page}");
    let stopped = weir.stop();
    assert!(
        stopped
            .stderr
            .contains("is not the one of the first certificate")
    );
}

/// Principals by certificate and by token, on one listener.
const PRINCIPALS: &str = "[[principal]]\nname = \"device\"\ncertificate = { subjects = [\"CN=device-1,O=Example\"] }\n\
     [[principal]]\nname = \"other\"\ncertificate = { subjects = [\"CN=device-2,O=Example\"] }\n\
     [[principal]]\nname = \"token\"\nbearer = [{ file = \"token\" }]\n\
     [[route]]\npath = \"/device\"\nprincipals = [\"device\"]\n\
     [[route]]\npath = \"/both\"\nprincipals = [\"device\", \"token\"]\n\
     [[route]]\npath = \"/open\"\n";

fn start_mutual(auth: &str) -> (Weir, Authority) {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    authority.server(1).write(path);
    std::fs::write(path.join("ca.pem"), &authority.pem).unwrap();
    std::fs::write(path.join("crl.pem"), authority.revoke(&[66])).unwrap();
    std::fs::write(path.join("token"), "secret").unwrap();
    let tls = format!("{TLS}, client_ca = \"ca.pem\", client_crl = \"crl.pem\"{auth}");
    (start_in(directory, &tls, PRINCIPALS), authority)
}

/// The status of a request, or why the handshake failed.
fn asked(
    weir: &Weir,
    authority: &Authority,
    shown: Option<&Pair>,
    path: &str,
    field: &str,
) -> Result<u16, std::io::Error> {
    let config = Arc::new(authority.config(shown));
    let mut client = Sealed::connect(weir.address, &config)?;
    let wire =
        format!("POST {path} HTTP/1.1\r\nHost: a\r\n{field}Content-Length: 7\r\n\r\n{{\"a\":1}}");
    let ciphertext = client.seal(wire.as_bytes());
    client.stream.write_all(&ciphertext)?;
    client.status()
}

const TOKEN: &str = "Authorization: Bearer secret\r\n";

#[test]
fn a_certificate_is_a_credential_and_has_to_be_shown_where_it_is_required() {
    let (weir, authority) = start_mutual("");
    let device = authority.client("device-1", 11);
    let other = authority.client("device-2", 12);
    let stranger = authority.client("device-3", 13);
    let ask = |shown, path, field| asked(&weir, &authority, shown, path, field);
    assert_eq!(ask(Some(&device), "/device", "").unwrap(), 201);
    assert_eq!(ask(Some(&device), "/both", "").unwrap(), 201);
    for wrong in [&other, &stranger] {
        assert_eq!(ask(Some(wrong), "/device", "").unwrap(), 403);
        assert_eq!(ask(Some(wrong), "/device", TOKEN).unwrap(), 403);
        assert_eq!(ask(Some(wrong), "/both", TOKEN).unwrap(), 201);
        assert_eq!(ask(Some(wrong), "/open", "").unwrap(), 201);
    }
    let error = ask(None, "/open", "").unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    // Of another authority, with the right name.
    let foreign = Authority::new().client("device-1", 11);
    let error = ask(Some(&foreign), "/open", "").unwrap_err().to_string();
    assert!(error.contains("fatal alert"), "{error}");
    let revoked = authority.client("device-1", 66);
    let error = ask(Some(&revoked), "/device", "").unwrap_err().to_string();
    assert!(error.contains("CertificateRevoked"), "{error}");
    assert_eq!(weir.metric("weir_tls_failures_total"), 3);
}

#[test]
fn where_a_certificate_is_optional_another_credential_will_do() {
    let (weir, authority) = start_mutual(", client_auth = \"optional\"");
    let device = authority.client("device-1", 11);
    let ask = |shown, path, field| asked(&weir, &authority, shown, path, field);
    assert_eq!(ask(Some(&device), "/device", "").unwrap(), 201);
    assert_eq!(ask(None, "/both", TOKEN).unwrap(), 201);
    assert_eq!(ask(None, "/both", "").unwrap(), 401);
    assert_eq!(ask(None, "/device", "").unwrap(), 403);
    assert_eq!(ask(None, "/device", TOKEN).unwrap(), 403);
    assert_eq!(ask(None, "/open", "").unwrap(), 201);
    let revoked = authority.client("device-1", 66);
    assert!(ask(Some(&revoked), "/open", "").is_err());
}

/// A list that is new ends what could be resumed under the old one.
#[test]
fn who_is_revoked_does_not_resume() {
    let (weir, authority) = start_mutual("");
    let device = authority.client("device-1", 11);
    let config = Arc::new(authority.config(Some(&device)));
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let mut client = Sealed::connect(weir.address, &config).unwrap();
        let ciphertext = client.seal(&request("/device", b"{\"a\":1}"));
        client.stream.write_all(&ciphertext).unwrap();
        assert_eq!(client.status().unwrap(), 201);
        assert_eq!(client.connection.handshake_kind(), Some(kind));
    }
    let list = authority.revoke(&[11, 66]);
    std::fs::write(weir.directory.path().join("crl.pem"), list).unwrap();
    weir.wait_for_metric("weir_tls_reloads_total 1");
    let mut client = Sealed::connect(weir.address, &config).unwrap();
    let ciphertext = client.seal(&request("/device", b"{\"a\":1}"));
    let _ = client.stream.write_all(&ciphertext);
    let error = client.status().unwrap_err().to_string();
    assert!(error.contains("CertificateRevoked"), "{error}");
}

#[test]
fn files_that_do_not_work_are_named_by_start_and_check() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let key = path.join("tls.key");
    let refused = |expected: &str| {
        let text = config(free_address(), TLS, "");
        let (code, stderr) = run_to_its_end(path, &text);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{expected}: {stderr}");
        let check = command(path, &text);
        let check = std::process::Command::new(check.get_program())
            .args(["check", "--config"])
            .arg(path.join("weir.toml"))
            .output()
            .unwrap();
        let said = String::from_utf8(check.stdout).unwrap();
        assert!(check.status.success() && said.contains(expected), "{said}");
    };
    refused("tls.crt: No such file");
    authority.server(1).write(path);
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    refused("tls.key can be read by everybody (mode 0644): chmod 600");
    authority.server(1).write(path);
    std::fs::write(path.join("tls.crt"), authority.server(2).certificate).unwrap();
    refused("is not the one of the first certificate in");
    std::fs::write(path.join("tls.crt"), "nothing").unwrap();
    refused("tls.crt has no certificate in PEM");
    authority.server(1).write(path);
    std::fs::write(&key, "nothing").unwrap();
    refused("tls.key has no private key in PEM");
}

#[test]
fn the_demo_prints_how_to_reach_it_over_tls() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["demo", "--tls", "--out", "out"])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .current_dir(directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(demo.stdout.take().unwrap());
    let command = loop {
        let mut line = String::new();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended");
        if line.contains("curl ") {
            break line;
        }
    };
    let words: Vec<&str> = command.split_whitespace().collect();
    assert_eq!(words[..2], ["curl", "--cacert"], "{command}");
    let certificate = directory.path().join(words[2]);
    let (_, rest) = command.split_once("https://").unwrap();
    let address = rest.split('/').next().unwrap();
    // What curl does, as far as this is about the certificate.
    let config = believing(&std::fs::read_to_string(&certificate).unwrap());
    let mut client = Sealed::connect(address.parse().unwrap(), &Arc::new(config)).unwrap();
    let ciphertext = client.seal(&request("/demo", b"{\"a\":1}"));
    client.stream.write_all(&ciphertext).unwrap();
    assert_eq!(client.status().unwrap(), 201);
    drop(client);
    let pid = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(demo.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("1 records in 1 blobs"), "{rest}");
    assert!(!certificate.exists(), "it is thrown away");
}
