//! What a connection of `client` reads and writes: a socket, or TLS on it.
//!
//! Both ends of TLS are rustls, so what is compared is what the server makes of it.
//! Lives on the client's thread; TLS allocates when a connection is made, and per record what rustls does.
//!
//! Invariant: a read or a write never waits; only the handshake does, and it ends within a time.
//! Not here: when to read and write; and HTTP/2, whose client does this by tokio-rustls.

use anyhow::{Context, Result};
use mio::net::TcpStream;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, IpAddr, Ipv4Addr, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Plaintext given to rustls at once: four records.
const PIECE_SIZE: usize = 64 << 10;

/// Who the server is: a throw-away certificate for 127.0.0.1, and those who believe it.
#[derive(Clone)]
pub struct Identity {
    certificate: String,
    key: String,
}

impl Identity {
    pub fn new() -> Result<Self> {
        let mut parameters = CertificateParams::default();
        let address = std::net::IpAddr::from([127, 0, 0, 1]);
        parameters.subject_alt_names = vec![SanType::IpAddress(address)];
        let key = KeyPair::generate().context("a key")?;
        let certificate = parameters.self_signed(&key).context("a certificate")?;
        Ok(Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Writes `tls.crt` and `tls.key`, which nobody else may read.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::write(directory.join("tls.crt"), &self.certificate).context("writing tls.crt")?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(directory.join("tls.key"))
            .and_then(|mut file| file.write_all(self.key.as_bytes()))
            .context("writing tls.key")
    }

    /// A client that believes this certificate alone, and offers one protocol.
    pub fn client(&self, protocol: &str) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.certificate.as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        Ok(Arc::new(config))
    }
}

/// The name that is in the certificate.
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([127, 0, 0, 1])))
}

pub enum Transport {
    Plain(TcpStream),
    Tls {
        socket: TcpStream,
        session: Box<ClientConnection>,
    },
}

impl Transport {
    /// Plain: of a socket that does not wait. TLS: of one that does and is connected; shakes hands first.
    pub fn new(mut socket: std::net::TcpStream, tls: Option<&Arc<ClientConfig>>) -> Result<Self> {
        let Some(config) = tls else {
            return Ok(Transport::Plain(TcpStream::from_std(socket)));
        };
        let mut session = ClientConnection::new(Arc::clone(config), server_name())?;
        socket.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        while session.is_handshaking() {
            session.complete_io(&mut socket).context("TLS handshake")?;
        }
        socket.set_nonblocking(true)?;
        Ok(Transport::Tls {
            socket: TcpStream::from_std(socket),
            session: Box::new(session),
        })
    }

    /// What to register and to ask for errors.
    pub fn socket(&mut self) -> &mut TcpStream {
        match self {
            Transport::Plain(socket) | Transport::Tls { socket, .. } => socket,
        }
    }

    /// Something that was written waits for the socket.
    pub fn has_unsent(&self) -> bool {
        match self {
            Transport::Plain(_) => false,
            Transport::Tls { session, .. } => session.wants_write(),
        }
    }

    pub fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let (socket, session) = match self {
            Transport::Plain(socket) => return socket.read(space),
            Transport::Tls { socket, session } => (socket, session),
        };
        loop {
            match session.reader().read(space) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            // At the end of the stream the reader says so the next time.
            session.read_tls(socket)?;
            session
                .process_new_packets()
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Transport::Plain(socket) = self {
            return socket.write(bytes);
        }
        // What is sealed goes first, so that no more than a piece is ever held.
        self.flush()?;
        let Transport::Tls { session, .. } = self else {
            unreachable!("the other one was written to");
        };
        let count = session
            .writer()
            .write(&bytes[..bytes.len().min(PIECE_SIZE)])?;
        match self.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
        }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        if let Transport::Tls { socket, session } = self {
            while session.wants_write() {
                session.write_tls(socket)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_believed_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        let identity = Identity::new().expect("made");
        identity.write(directory.path()).expect("written");
        let mode = |name: &str| {
            let metadata = fs::metadata(directory.path().join(name)).expect("there");
            metadata.permissions().mode() & 0o777
        };
        assert_eq!(mode("tls.key"), 0o600);
        assert!(mode("tls.crt") > 0);
        let client = identity.client("h2").expect("a configuration");
        assert_eq!(client.alpn_protocols, [b"h2"]);
    }
}
