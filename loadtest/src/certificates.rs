//! Certificates for one run: a CA, and one each for server, agent and frontend.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use culvert_process::faults::CertificatePair;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

use crate::link;

/// Certificates in a folder that is removed with this value.
#[derive(Debug)]
pub struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    /// Makes a CA and three certificates of it, each for `localhost`, the loopback addresses and
    /// the server's host on a [`Link`](crate::link::Link).
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn generate() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("culvert-").tempdir()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "culvert loadtest CA");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let ca = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        fs::write(folder.path().join("ca.crt"), ca.pem())?;
        for name in ["server", "agent", "frontend"] {
            let (certificate, key) = leaf(name, &ca)?;
            fs::write(folder.path().join(format!("{name}.crt")), certificate)?;
            fs::write(folder.path().join(format!("{name}.key")), key)?;
        }
        Ok(Self { folder })
    }

    /// The folder, which takes sockets and logs too.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The CA's certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// Certificate of the server, for agents and frontends.
    pub fn server(&self) -> CertificatePair {
        self.pair("server")
    }

    /// Client certificate of agents.
    pub fn agent(&self) -> CertificatePair {
        self.pair("agent")
    }

    /// Client certificate of frontends.
    pub fn frontend(&self) -> CertificatePair {
        self.pair("frontend")
    }

    fn pair(&self, name: &str) -> CertificatePair {
        CertificatePair {
            certificate: self.folder.path().join(format!("{name}.crt")),
            key: self.folder.path().join(format!("{name}.key")),
        }
    }
}

fn leaf(name: &str, ca: &CertifiedIssuer<'_, KeyPair>) -> io::Result<(String, String)> {
    let mut names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    names.push(link::SERVER.to_string());
    let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
    params.distinguished_name.push(DnType::CommonName, format!("culvert loadtest {name}"));
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let certificate = params.signed_by(&key, ca).map_err(io::Error::other)?;
    Ok((certificate.pem(), key.serialize_pem()))
}
