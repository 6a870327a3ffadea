//! The demo's certificate: signed by itself, and removed when the demo ends.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, KeyPair, SanType};

use crate::config::ListenerTls;
use crate::error::Fatal;

/// Its two files, until it is dropped.
pub struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
}

impl Certificate {
    /// Makes one for `localhost` and for the address that is listened on.
    pub fn make(directory: &Path, address: IpAddr) -> Result<Certificate, Fatal> {
        let files = Certificate {
            certificate: directory.join("demo.crt"),
            key: directory.join("demo.key"),
        };
        files
            .write(directory, address)
            .map_err(|source| Fatal::Io {
                action: "making the demo's certificate".into(),
                source,
            })?;
        Ok(files)
    }

    fn write(&self, directory: &Path, address: IpAddr) -> io::Result<()> {
        let made = || -> Result<(String, String), rcgen::Error> {
            let mut parameters = CertificateParams::new(["localhost".to_owned()])?;
            parameters
                .subject_alt_names
                .push(SanType::IpAddress(address));
            let key = KeyPair::generate()?;
            let certificate = parameters.self_signed(&key)?;
            Ok((certificate.pem(), key.serialize_pem()))
        };
        let (certificate, key) = made().map_err(io::Error::other)?;
        std::fs::create_dir_all(directory)?;
        std::fs::write(&self.certificate, certificate)?;
        // An earlier demo may have been killed: its file would keep its mode.
        match std::fs::remove_file(&self.key) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.key)?;
        file.write_all(key.as_bytes())
    }

    pub fn listener(&self) -> ListenerTls {
        ListenerTls {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            client: None,
        }
    }

    /// What tells curl to trust it.
    pub fn argument(&self) -> String {
        format!("--cacert {}", self.certificate.display())
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        // Nobody trusts it any more, and the next demo writes its own.
        let _ = std::fs::remove_file(&self.certificate);
        let _ = std::fs::remove_file(&self.key);
    }
}
