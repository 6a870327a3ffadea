//! From files to a configuration of rustls: certificate, key, authorities of clients, what they revoked.
//!
//! Before it: the configuration names the files.
//! After it: [`crate::tls::Tls`] gives it to new connections.
//! Thread: the main thread at start, then a thread that may block. Allocates: freely.
//! Invariant: what is loaded works: the key is the certificate's, and is not readable by everybody.
//! Not here: when to load.
//!
//! The policy (docs/CONFIG.md, "TLS"): TLS 1.3 and 1.2 with authenticated encryption only; X25519MLKEM768, X25519 and
//! P-256; no renegotiation and no early data, which could be replayed; tickets, with keys of this configuration alone
//! that are renewed every six hours: after a reload nobody resumes what the new one would not let in.

use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use zeroize::Zeroizing;

use super::certificate;
use crate::config::{ClientAuth, ListenerTls};
use crate::limits::{MIB, TLS_FILE_SIZE_MAX};

/// Why a listener cannot speak TLS, and what to change.
#[derive(Debug, thiserror::Error)]
pub enum TlsFault {
    #[error("cannot read {}: {source}; check the path and who may read it", path.display())]
    Unreadable { path: PathBuf, source: io::Error },

    #[error("{} is larger than 4 MiB; name the file with the {what}", path.display())]
    Size { path: PathBuf, what: &'static str },

    #[error("{} has no {what} in PEM that can be read; {hint}", path.display())]
    Content {
        path: PathBuf,
        what: &'static str,
        hint: &'static str,
    },

    #[error(
        "the key {} can be read by everybody (mode {mode:04o}): chmod 600 it, or 640 for a group", path.display()
    )]
    KeyOpen { path: PathBuf, mode: u32 },

    #[error(
        "the key {} is not the one of the first certificate in {}; the listener's own certificate comes first, and \
         both files belong to the same request", key.display(), certificate.display()
    )]
    Mismatch { certificate: PathBuf, key: PathBuf },

    #[error("{} is not taken: {source}; replace the file", path.display())]
    Refused {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

const _: () = assert!(TLS_FILE_SIZE_MAX == 4 * MIB, "a message names this number");

/// The names of ALPN (RFC 7301 §6, RFC 9113 §3.1).
pub const HTTP_1_1: &[u8] = b"http/1.1";
pub const HTTP_2: &[u8] = b"h2";

/// A configuration that works, and when its certificate expires.
pub struct Loaded {
    pub config: Arc<ServerConfig>,
    /// The same, where HTTP/2 is offered too.
    pub with_http2: Arc<ServerConfig>,
    /// Seconds since 1970.
    pub expires_at: i64,
}

/// Which version of a file it is: replaced, renamed over or written into, one of these changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    modified: (i64, i64),
    size: u64,
    inode: (u64, u64),
}

/// The files of a listener, in a fixed order.
fn paths(tls: &ListenerTls) -> impl Iterator<Item = &Path> {
    let client = tls.client.as_ref();
    let own = [Some(&tls.certificate), Some(&tls.key)];
    let of_clients = [
        client.map(|client| &client.ca),
        client.and_then(|client| client.crl.as_ref()),
    ];
    own.into_iter()
        .chain(of_clients)
        .flatten()
        .map(PathBuf::as_path)
}

/// The versions of all files of a listener; none for one that is not there.
pub fn stamps(tls: &ListenerTls) -> Vec<Option<Stamp>> {
    paths(tls)
        .map(|path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some(Stamp {
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                size: metadata.len(),
                inode: (metadata.dev(), metadata.ino()),
            })
        })
        .collect()
}

/// Reads and checks all files of a listener.
pub fn load(tls: &ListenerTls) -> Result<Loaded, TlsFault> {
    let provider = Arc::new(provider());
    let chain = certificates(&tls.certificate)?;
    let key = key(&tls.key)?;
    let verifier = match &tls.client {
        None => Arc::new(NoClientAuth),
        Some(client) => verifier(client, &provider)?,
    };
    let expires_at = certificate::expires_at(&chain[0]).ok_or_else(|| TlsFault::Content {
        path: tls.certificate.clone(),
        what: "certificate",
        hint: NOT_X509,
    })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .and_then(|builder| {
            builder
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain, key)
        })
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => TlsFault::Mismatch {
                certificate: tls.certificate.clone(),
                key: tls.key.clone(),
            },
            error => TlsFault::Refused {
                path: tls.certificate.clone(),
                source: error.into(),
            },
        })?;
    config.alpn_protocols = vec![HTTP_1_1.to_vec()];
    // Tickets are with the clients; a store of sessions would be memory of ours.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(|error| TlsFault::Refused {
        path: tls.key.clone(),
        source: error.into(),
    })?;
    assert!(config.max_early_data_size == 0 && !config.send_half_rtt_data);
    // RFC 9113 §3.2; what the server likes best comes first.
    let mut with_http2 = config.clone();
    with_http2.alpn_protocols.insert(0, HTTP_2.to_vec());
    Ok(Loaded {
        config: Arc::new(config),
        with_http2: Arc::new(with_http2),
        expires_at,
    })
}

/// The cipher suites of aws-lc-rs are all authenticated encryption with forward secrecy.
fn provider() -> CryptoProvider {
    CryptoProvider {
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    }
}

const NOT_X509: &str = "it begins with -----BEGIN CERTIFICATE-----";

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    let pem = read(path, "certificate")?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(TlsFault::Content {
            path: path.into(),
            what: "certificate",
            hint: NOT_X509,
        }),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFault> {
    let pem = read(path, "private key")?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| TlsFault::Content {
        path: path.into(),
        what: "private key",
        hint: "an encrypted one has to be decrypted first: openssl pkey -in KEY -out PLAIN",
    })
}

/// Who may do without a certificate, and whose count.
fn verifier(
    client: &ClientAuth,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsFault> {
    let refused = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsFault::Refused { path, source }
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&client.ca)? {
        roots
            .add(certificate)
            .map_err(|error| refused(&client.ca)(error.into()))?;
    }
    let mut builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if let Some(path) = &client.crl {
        let pem = read(path, "revocation list")?;
        let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
        let lists = lists.ok().filter(|lists| !lists.is_empty());
        let lists = lists.ok_or_else(|| TlsFault::Content {
            path: path.clone(),
            what: "revocation list",
            hint: "it begins with -----BEGIN X509 CRL-----",
        })?;
        // A list need not be there for every authority on the way; one that is there counts.
        builder = builder.with_crls(lists).allow_unknown_revocation_status();
    }
    if client.optional {
        builder = builder.allow_unauthenticated();
    }
    builder.build().map_err(|error| {
        let path = client.crl.as_ref().unwrap_or(&client.ca);
        refused(path)(error.into())
    })
}

/// A whole file. The same for keys as for certificates, so its memory is zeroed when it is given back.
fn read(path: &Path, what: &'static str) -> Result<Zeroizing<Vec<u8>>, TlsFault> {
    let unreadable = |source| TlsFault::Unreadable {
        path: path.into(),
        source,
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let mode = metadata.permissions().mode() & 0o777;
    if what == "private key" {
        if mode & 0o007 != 0 {
            return Err(TlsFault::KeyOpen {
                path: path.into(),
                mode,
            });
        }
        if mode & 0o070 != 0 {
            tracing::warn!(
                key = %path.display(),
                mode = format!("{mode:04o}"),
                "the key can be read by a group; chmod 600 it where nobody in there needs it"
            );
        }
    }
    // Of the full size from the start: a buffer that grows leaves unzeroed copies behind.
    let size = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let too_large = || TlsFault::Size {
        path: path.into(),
        what,
    };
    if size > TLS_FILE_SIZE_MAX {
        return Err(too_large());
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
    file.take(TLS_FILE_SIZE_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    match bytes.len() {
        size if size > TLS_FILE_SIZE_MAX => Err(too_large()),
        _ => Ok(bytes),
    }
}
