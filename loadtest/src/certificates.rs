//! Certificates for one run: a CA, and one each for server, agent and frontend.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use culvert_process::faults::CertificatePair;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

use crate::link;

/// Names of the certificates.
const LEAVES: [&str; 3] = ["server", "agent", "frontend"];

/// Certificates in a folder that is removed with this value.
pub struct Certificates {
    folder: tempfile::TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("folder", &self.folder).finish_non_exhaustive()
    }
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
        let certificates = Self { folder, ca };
        for name in LEAVES {
            certificates.renew(name)?;
        }
        Ok(certificates)
    }

    /// Makes a certificate whose common name is exactly this. The pair with the same name is
    /// replaced.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn issue(&self, name: &str) -> io::Result<CertificatePair> {
        self.issue_with(name, &|_| ())
    }

    /// The same for this time, from `from` to `until`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn issue_for(
        &self,
        name: &str,
        from: SystemTime,
        until: SystemTime,
    ) -> io::Result<CertificatePair> {
        self.issue_with(name, &|params| {
            (params.not_before, params.not_after) = (from.into(), until.into());
        })
    }

    fn issue_with(
        &self,
        name: &str,
        change: &dyn Fn(&mut CertificateParams),
    ) -> io::Result<CertificatePair> {
        let (certificate, key) = leaf(name, &self.ca, change)?;
        let pair = self.pair(&format!("issued-{}", name.replace(':', "-")));
        fs::write(&pair.certificate, certificate)?;
        fs::write(&pair.key, key)?;
        Ok(pair)
    }

    /// Replaces a certificate and its key by new ones of the same CA; the name is `server`, `agent`
    /// or `frontend`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn renew(&self, name: &str) -> io::Result<()> {
        let (certificate, key) = leaf(&format!("culvert loadtest {name}"), &self.ca, &|_| ())?;
        let pair = self.pair(name);
        fs::write(pair.certificate, certificate)?;
        fs::write(pair.key, key)
    }

    /// Replaces the CA and all certificates by those of `others`.
    ///
    /// # Errors
    /// When the files cannot be copied.
    pub fn replace_by(&self, others: &Self) -> io::Result<()> {
        fs::copy(others.ca(), self.ca())?;
        for name in LEAVES {
            let (ours, theirs) = (self.pair(name), others.pair(name));
            fs::copy(theirs.certificate, ours.certificate)?;
            fs::copy(theirs.key, ours.key)?;
        }
        Ok(())
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

fn leaf(
    common_name: &str,
    ca: &CertifiedIssuer<'_, KeyPair>,
    change: &dyn Fn(&mut CertificateParams),
) -> io::Result<(String, String)> {
    let mut names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    names.push(link::SERVER.to_string());
    let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let certificate = params.signed_by(&key, ca).map_err(io::Error::other)?;
    Ok((certificate.pem(), key.serialize_pem()))
}
