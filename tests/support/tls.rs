//! TLS for tests: an authority that signs, and a tunnel that lets a client of plain TCP speak to a TLS listener.

#![allow(dead_code)] // Each test binary uses its own part of this.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// A certificate authority, and a file with its certificate.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, both PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
    pub serial: u64,
}

impl Authority {
    pub fn new() -> Authority {
        let mut parameters = CertificateParams::default();
        parameters
            .distinguished_name
            .push(DnType::CommonName, "tests");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = parameters.self_signed(&key).unwrap().pem();
        Authority {
            pem,
            issuer: Issuer::new(parameters, key),
        }
    }

    fn issue(&self, mut parameters: CertificateParams, serial: u64) -> Pair {
        parameters.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        Pair {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            serial,
        }
    }

    /// A certificate for 127.0.0.1.
    pub fn server(&self, serial: u64) -> Pair {
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().unwrap())];
        self.issue(parameters, serial)
    }

    /// A client's certificate with the subject `CN=name,O=Example`.
    pub fn client(&self, name: &str, serial: u64) -> Pair {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters
            .distinguished_name
            .push(DnType::OrganizationName, "Example");
        parameters.distinguished_name.push(DnType::CommonName, name);
        self.issue(parameters, serial)
    }

    /// A revocation list with these serial numbers.
    pub fn revoke(&self, serials: &[u64]) -> String {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: rcgen::date_time_ymd(2026, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2026, 1, 1),
            next_update: rcgen::date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }

    pub fn roots(&self) -> Arc<RootCertStore> {
        roots(&self.pem)
    }

    /// What a client believes, and shows where it is asked.
    pub fn config(&self, shown: Option<&Pair>) -> ClientConfig {
        match shown {
            None => believing(&self.pem),
            Some(pair) => {
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let builder = ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()
                    .unwrap()
                    .with_root_certificates(self.roots());
                let chain = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![chain], key).unwrap()
            }
        }
    }
}

impl Pair {
    /// Writes `tls.crt` and `tls.key` below `directory`.
    pub fn write(&self, directory: &Path) {
        std::fs::write(directory.join("tls.crt"), &self.certificate).unwrap();
        let key = directory.join("tls.key");
        std::fs::write(&key, &self.key).unwrap();
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    }
}

fn roots(pem: &str) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    Arc::new(roots)
}

/// A client that believes this certificate.
pub fn believing(pem: &str) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(pem))
        .with_no_client_auth()
}

pub fn connection(config: &Arc<ClientConfig>) -> ClientConnection {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    ClientConnection::new(config.clone(), name).unwrap()
}

/// A listener of plain TCP, each connection of which is one of TLS to another address. An end of the stream becomes a
/// `close_notify`, and a handshake that fails an end.
pub struct Tunnel {
    pub address: SocketAddr,
}

impl Tunnel {
    /// What is written at once is sent in records of at most `record_size` bytes.
    pub fn open(to: SocketAddr, config: ClientConfig, record_size: usize) -> Tunnel {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = Arc::new(config);
        // Ends with the process of the test.
        std::thread::spawn(move || {
            for plain in listener.incoming() {
                let (plain, config) = (plain.unwrap(), config.clone());
                std::thread::spawn(move || {
                    // Whatever goes wrong, the client sees the end of its stream.
                    let _ = relay(&plain, to, &config, record_size);
                    let _ = plain.shutdown(Shutdown::Both);
                });
            }
        });
        Tunnel { address }
    }
}

fn relay(
    plain: &TcpStream,
    to: SocketAddr,
    config: &Arc<ClientConfig>,
    record_size: usize,
) -> std::io::Result<()> {
    let mut sealed = TcpStream::connect(to)?;
    sealed.set_nodelay(true)?;
    plain.set_nodelay(true)?;
    let mut connection = connection(config);
    while connection.is_handshaking() {
        connection.complete_io(&mut sealed)?;
    }
    let connection = Mutex::new(connection);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![0; record_size];
            let (mut plain, mut sealed) = (plain, &sealed);
            loop {
                let size = plain.read(&mut bytes).unwrap_or(0);
                let mut connection = connection.lock().unwrap();
                match size {
                    0 => connection.send_close_notify(),
                    size => connection.writer().write_all(&bytes[..size]).unwrap(),
                }
                while connection.wants_write() {
                    if connection.write_tls(&mut sealed).is_err() {
                        return;
                    }
                }
                if size == 0 {
                    return;
                }
            }
        });
        let received = receive(plain, &sealed, &connection);
        let _ = plain.shutdown(Shutdown::Both);
        let _ = sealed.shutdown(Shutdown::Both);
        received
    })
}

fn receive(
    mut plain: &TcpStream,
    mut sealed: &TcpStream,
    connection: &Mutex<ClientConnection>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 16 * 1024];
    let mut plaintext = Vec::new();
    // What came with the handshake is there already.
    let mut size = 0;
    loop {
        {
            let mut connection = connection.lock().unwrap();
            let mut unread = &bytes[..size];
            while !unread.is_empty() {
                connection.read_tls(&mut unread)?;
                let state = connection
                    .process_new_packets()
                    .map_err(std::io::Error::other)?;
                let begin = plaintext.len();
                plaintext.resize(begin + state.plaintext_bytes_to_read(), 0);
                connection.reader().read_exact(&mut plaintext[begin..])?;
            }
        }
        plain.write_all(&plaintext)?;
        plaintext.clear();
        size = sealed.read(&mut bytes)?;
        if size == 0 {
            return Ok(());
        }
    }
}
